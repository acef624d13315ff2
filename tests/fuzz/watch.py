"""What every fuzzed call is held to: our errors only, in time, and no write outside a sandbox.

def header(watch, choose):                    # one bad input
    path = watch.put("x.safetensors", broken_bytes(choose, VALID))
    infos = watch.outcome(lambda: read_header(path))      # None where it was refused

watch.fuzz("headers", header, inputs=3000)    # the same 3000 at every run
"""

import os
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.errors import LayersweepError
from tests.fuzz.mutations import Chooser

SECONDS = 10  # for one input; the slowest needs a tenth of a second
BATCH = 25  # inputs for one number that hypothesis draws
# What Python tells its audit hooks before it changes a file system; first argument: the path.
CHANGES = frozenset(
    f"os.{name}"
    for name in ("mkdir", "remove", "rename", "rmdir", "symlink", "link", "truncate", "chmod")
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class HangError(Exception):
    """An input took too long."""


class Watch:
    """Counts inputs, and listens to what Python writes; there is one per process."""

    def __init__(self, sandbox: Path) -> None:
        self.sandbox = sandbox
        self.began_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        self.run: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._target = ""
        self._is_listening = False
        self._strays: list[str] = []
        sys.addaudithook(self._hear)  # cannot be removed; it is deaf outside of calls

    def fuzz(self, target: str, attempt: Callable[[Chooser], None], *, inputs: int) -> None:
        """Tries so many inputs at least; a tenth of them are hypothesis's own, for small examples.

        Args:
            target: What is fuzzed.
            attempt: Makes one input and tries it.
            inputs: How many.
        """
        self._target = target

        def drawn(data: st.DataObject) -> None:
            attempt(Chooser(lambda low, high: data.draw(st.integers(low, high))))

        def seeded(seed: int) -> None:
            choose = Chooser(random.Random(seed).randint)
            for _ in range(BATCH):
                attempt(choose)

        _settings(inputs // 10)(given(data=st.data())(drawn))()
        seeds = st.integers(0, 2**32 - 1)
        _settings((inputs - inputs // 10) // BATCH + 1)(given(seed=seeds)(seeded))()

    def put(self, name: str, data: bytes) -> Path:
        """A file of the sandbox, made or replaced."""
        path = self.sandbox / name
        path.write_bytes(data)
        return path

    def outcome(self, call: Callable[[], Any]) -> Any:
        """What a call makes of an input; None where it refuses. Any other exception passes on."""
        self.run[self._target] += 1
        try:
            with self._listening():
                return call()
        except LayersweepError as error:
            self.refused[self._target] += 1
            message = str(error)
            assert len(message) < 20_000, f"a message of {len(message)} characters"
            message.encode("utf-8")  # a log must be able to hold it
            return None

    @contextmanager
    def _listening(self) -> Iterator[None]:
        self._strays.clear()
        previous = signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
            assert not self._strays, f"written outside the sandbox: {self._strays}"

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_listening:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)):
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(f"{self.sandbox}{os.sep}") and real != os.devnull:
                self._strays.append(f"{event} {real!r}")


def _settings(examples: int) -> settings:
    """The same inputs at every run, without a clock (`Watch` has one) and without a memory."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def _ring(_number: int, _frame: object) -> None:
    raise HangError(f"more than {SECONDS} s")
