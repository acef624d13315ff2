"""Where a rank is: what its peers, the user and the next attempt learn about it.

In: cheap calls from the sweep; they take no lock and touch no device. Out: `Life`, which other
threads read, and `Pulse`, which tells how long a rank has stood still.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

LEAST_BYTES_PER_S = 256 * 1024
"""Of reading and writing, by which a rank that waits for a file system is known to go on."""
LEAST_CORES = 0.5
"""In use, by which a rank that computes on the CPU is known to go on."""


class Phase(StrEnum):
    """What a rank is doing."""

    prepare = "prepare"
    read = "read"
    forward = "forward"
    evaluate = "evaluate"
    commit = "commit"
    wait = "wait"
    publish = "publish"
    audit = "audit"


class Life:
    """One rank's place in the run.

    Attributes:
        layers: Layers that this attempt visits.
        done: Those of them that it has done with.
        steps: Counts every change. All ranks make the same ones, so the one with the fewest is the
            one that the others wait for.
        since: Unix time of the last change.
        todo: Those that are not committed yet; None before that is known.
        figures: What rank 0's progress lines tell.
    """

    def __init__(self) -> None:
        self._at: tuple[Phase, int | None] = (Phase.prepare, None)
        self.layers = self.done = self.steps = 0
        self.since = time.time()
        self.todo: list[int] | None = None
        self.figures: Mapping[str, float] = {}

    @property
    def phase(self) -> Phase:
        """What the rank is doing."""
        return self._at[0]

    @property
    def layer(self) -> int | None:
        """In which layer; None outside the sweep."""
        return self._at[1]

    @property
    def at(self) -> tuple[Phase, int | None]:
        """Phase and layer, which belong together."""
        return self._at

    @property
    def next_layer(self) -> int | None:
        """The first one that is not committed; -1 if all are, None before that is known."""
        return None if self.todo is None else next(iter(self.todo), -1)

    def enter(self, phase: Phase, layer: int | None = None) -> None:
        """The rank begins with something else."""
        self._at = (phase, layer)
        self.advance()

    def advance(self) -> None:
        """The rank has done some of what it is doing."""
        self.steps += 1
        self.since = time.time()

    def layer_done(self, layer: int, figures: Mapping[str, float]) -> None:
        """A layer is committed, or was passed through."""
        self.done += 1
        self.figures = figures
        self.todo = [other for other in self.todo or () if other != layer]
        self.advance()

    @contextmanager
    def during(self, phase: Phase, layer: int | None = None) -> Iterator[None]:
        """Something in between. An error keeps its place: it is told with the failure."""
        before = self._at
        self.enter(phase, layer)
        yield
        self.enter(*before)


class Pulse:
    """Seconds for which a rank has stood still, on a clock that stops when the process does.

    A rank also moves while bytes do, and on a CPU while it computes: a slow file system, or a large
    layer, is no standstill.

    Args:
        life: Of the rank.
        counts_cpu: Whether time on the CPU counts (beside a GPU, waiting may burn it).
    """

    def __init__(self, life: Life, *, counts_cpu: bool) -> None:
        self._life, self._counts_cpu = life, counts_cpu
        self._steps, self._bytes, self._cpu_s = -1, _bytes_moved(), _cpu_seconds()
        self.still_s = 0.0

    def tick(self, elapsed_s: float) -> None:
        """Looks whether anything has moved since the last call, `elapsed_s` ago."""
        bytes_moved, cpu_s = _bytes_moved(), _cpu_seconds()
        has_moved = (
            self._life.steps != self._steps
            or bytes_moved - self._bytes > LEAST_BYTES_PER_S * elapsed_s
            or (self._counts_cpu and cpu_s - self._cpu_s > LEAST_CORES * elapsed_s)
        )
        self._steps, self._bytes, self._cpu_s = self._life.steps, bytes_moved, cpu_s
        self.still_s = 0.0 if has_moved else self.still_s + elapsed_s


def _bytes_moved() -> int:
    """Bytes that this process has read and written, where Linux counts them."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            counts = dict(line.split(": ") for line in file)
    except (OSError, ValueError):
        return 0
    return int(counts.get("rchar", 0)) + int(counts.get("wchar", 0))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
