"""What can go wrong with a run: each kind of fault, and what a run owes after it.

In: a random generator, the place of the campaign (`bench.fault_runs`). Out: an `Injection`: what
is done to the files before an attempt, inside a rank, or to a rank from outside; and which
endings of the struck attempt are right. The faults inside a rank stand between this package and
the system (`os.preadv`, `os.write`, the clock), where a file system or a device would fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import process_state
from pipeline.checkpoint.safetensors_file import read_header
from pipeline.mcore.slots import Slot

FINISHED, REFUSED, FAULT, STOPPED, KILLED = 0, 2, 3, 75, -signal.SIGKILL


@dataclass
class Attempt:
    """What is done to one attempt.

    Attributes:
        inside: Called in every rank before the job starts, with the rank; arms shims.
        outside: Called beside the running ranks with their process ids; returns when it struck
            (seconds of the monotonic clock), or None where the run had ended before.
        statuses: Exit statuses that the ranks may end with.
        named: What some rank's last words must hold, if the attempt did not finish.
    """

    inside: Callable[[int], None] = lambda rank: None
    outside: Callable[[list[int]], float | None] | None = None
    statuses: frozenset[int] = frozenset({FINISHED})
    named: str = ""


@dataclass
class Injection:
    """One fault and what follows.

    Attributes:
        attempts: One after the other; a last one without any fault follows, if none has finished.
        between: Called after the attempt of the same index; may damage or mend files.
        options: Of the job, for all attempts.
    """

    attempts: list[Attempt]
    between: list[Callable[[], None]] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scene:
    """What a fault may choose from.

    Attributes:
        random: Of this injection.
        world: Number of ranks.
        seconds: That an undisturbed run takes.
        source: The checkpoint's directory, of this injection alone.
        work: The directory of the unfinished run.
        root: The file system that holds it.
        is_small: Whether `root` is a small file system of its own.
    """

    random: random.Random
    world: int
    seconds: float
    source: Path
    work: Path
    root: Path
    is_small: bool = False

    def rank(self) -> int:
        """Any."""
        return self.random.randrange(self.world)

    def moment(self) -> float:
        """Seconds after the start, up to the end of an undisturbed run."""
        return self.random.uniform(0.02, 1.0) * self.seconds


Kind = Callable[[Scene], Injection]


def sigkill(scene: Scene) -> Injection:
    """A rank is gone from one moment to the next."""
    rank = scene.rank()
    struck = Attempt(
        outside=_signal(signal.SIGKILL, [rank], scene.moment()),
        statuses=frozenset({FINISHED, KILLED, FAULT}),
        named=f"rank {rank}",
    )
    return Injection([struck])


def sigkill_all(scene: Scene) -> Injection:
    """Every rank is gone: the machine lost power."""
    ranks = list(range(scene.world))
    struck = Attempt(
        outside=_signal(signal.SIGKILL, ranks, scene.moment()),
        statuses=frozenset({FINISHED, KILLED}),
    )
    return Injection([struck])


def sigterm(scene: Scene) -> Injection:
    """The scheduler ends the job: all ranks get the signal."""
    ranks = list(range(scene.world))
    struck = Attempt(
        outside=_signal(signal.SIGTERM, ranks, scene.moment()),
        statuses=frozenset({FINISHED, STOPPED, -signal.SIGTERM}),
        named="stopped",
    )
    return Injection([struck])


def sigusr1(scene: Scene) -> Injection:
    """The scheduler tells one rank that the time is nearly over."""
    struck = Attempt(
        outside=_signal(signal.SIGUSR1, [scene.rank()], scene.moment(), once_begun=scene.work),
        statuses=frozenset({FINISHED, STOPPED}),
        named="stopped",
    )
    return Injection([struck])


def stop_file(scene: Scene) -> Injection:
    """The batch script asks the run to stop."""
    moment = scene.moment()

    def touch(pids: list[int]) -> float | None:
        struck = _wait(pids, moment, once_begun=scene.work)
        if struck is not None:
            try:
                (scene.work / "stop").touch()
            except FileNotFoundError:
                return None  # published meanwhile
        return struck

    return Injection(
        [Attempt(outside=touch, statuses=frozenset({FINISHED, STOPPED}), named="stopped")]
    )


def full_disk(scene: Scene) -> Injection:
    """Somebody else fills the file system; later there is room again."""
    moment, ballast = scene.moment(), scene.root / "ballast"

    def fill(pids: list[int]) -> float | None:
        struck = _wait(pids, moment)
        if struck is not None:
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                        file.flush()
                except OSError:
                    pass
        return struck

    struck = Attempt(outside=fill, statuses=frozenset({FINISHED, REFUSED, FAULT}), named="space")
    return Injection([struck], [lambda: ballast.unlink(missing_ok=True)])


def read_error(scene: Scene) -> Injection:
    """One read of a weight fails."""
    rank, number = scene.rank(), scene.random.randrange(200)

    def arm(here: int) -> None:
        if here == rank:
            _shim("preadv", number, OSError(errno.EIO, os.strerror(errno.EIO)))

    struck = Attempt(arm, statuses=frozenset({FINISHED, REFUSED, FAULT}), named="Input/output")
    return Injection([struck])


def write_error(scene: Scene) -> Injection:
    """One write fails."""
    rank, number = scene.rank(), scene.random.randrange(400)

    def arm(here: int) -> None:
        if here == rank:
            _shim("write", number, OSError(errno.EIO, os.strerror(errno.EIO)))

    struck = Attempt(arm, statuses=frozenset({FINISHED, REFUSED, FAULT}), named="Input/output")
    return Injection([struck])


def short_reads(scene: Scene) -> Injection:
    """Every read of weights brings less than was asked for."""
    seed, preadv = scene.random.random(), os.preadv

    def arm(rank: int) -> None:
        drawn = random.Random(f"{seed} {rank}")

        def short(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
            (view,) = buffers
            length = drawn.randint(1, max(1, len(view)))
            return preadv(descriptor, [memoryview(view)[:length]], offset, *flags)

        os.preadv = short

    return Injection([Attempt(arm)])


def truncated_shard(scene: Scene) -> Injection:
    """A shard of the source was not copied whole."""
    shard = scene.random.choice(sorted(scene.source.glob("*.safetensors")))
    whole = shard.read_bytes()
    os.truncate(shard, scene.random.randrange(len(whole)))
    refused = Attempt(statuses=frozenset({REFUSED}), named=shard.name)
    return Injection([refused], [lambda: _restore(shard, whole)])


def changed_source(scene: Scene) -> Injection:
    """A weight of a layer that is packed already changes, the file's size and time do not."""
    begun = _interrupted(scene)
    saved: dict[Path, bytes] = {}

    def change() -> None:
        layers = _committed_layers(scene.work)
        shards = sorted(scene.source.glob("*.safetensors"))
        named = [
            (path, info)
            for path in shards
            for info in read_header(path).values()
            if info.dtype == "BF16" and any(f".layers.{layer}." in info.name for layer in layers)
        ]
        if named:
            path, info = scene.random.choice(named)
            saved[path] = path.read_bytes()
            _flip(path, info.start + 2 * scene.random.randrange(info.elements))

    def restore() -> None:
        for path, data in saved.items():
            _restore(path, data)

    again = Attempt(statuses=frozenset({FINISHED, REFUSED}), named="chang")
    return Injection([begun, again], [change, restore], ["snapshots.layers=null"])


def damaged_output(scene: Scene) -> Injection:
    """A bit of a finished layer's file flips while no run is on."""
    return _damaged(scene, "checkpoint/*")


def damaged_snapshot(scene: Scene) -> Injection:
    """A bit of a snapshot flips while no run is on."""
    return _damaged(scene, "snapshots/*/*")


def damaged_journal(scene: Scene) -> Injection:
    """A bit of the journal flips while no run is on."""
    injection = _damaged(scene, "journal/*")
    saved: dict[Path, bytes] = {}
    damage = injection.between[0]

    def remember() -> None:
        saved.update({path: path.read_bytes() for path in scene.work.glob("journal/*")})
        damage()

    def restore() -> None:
        for path, data in saved.items():
            if path.parent.is_dir():
                path.write_bytes(data)

    again = Attempt(statuses=frozenset({FINISHED, REFUSED}), named="journal")
    return Injection([*injection.attempts, again], [remember, restore])


def clock_jump(scene: Scene) -> Injection:
    """The wall clock of a host is set by a day."""
    rank, moment = scene.rank(), scene.moment()
    jump = scene.random.choice([-86400.0, 86400.0])

    def arm(here: int) -> None:
        if here == rank:
            clock, begun = time.time, time.monotonic()
            time.time = lambda: clock() + (jump if time.monotonic() - begun > moment else 0.0)

    return Injection([Attempt(arm)])


def slow_rank(scene: Scene) -> Injection:
    """A rank stands still for some seconds."""
    rank, moment, pause = scene.rank(), scene.moment(), scene.random.uniform(0.5, 3.0)

    def freeze(pids: list[int]) -> float | None:
        struck = _signal(signal.SIGSTOP, [rank], moment)(pids)
        time.sleep(pause)
        _send(pids[rank], signal.SIGCONT)
        return struck

    return Injection([Attempt(outside=freeze)])


def frozen_rank(scene: Scene) -> Injection:
    """A rank stands still for ever, as one does whose file system hangs."""
    rank = scene.rank()
    struck = Attempt(
        outside=_signal(signal.SIGSTOP, [rank], scene.moment()),
        statuses=frozenset({FINISHED, KILLED, FAULT}),
        named=f"rank {rank}",
    )
    return Injection([struck])


def out_of_memory(scene: Scene) -> Injection:
    """A layer does not fit."""
    rank, number = scene.rank(), scene.random.randrange(60)

    def arm(here: int) -> None:
        if here == rank:
            forward, calls = Slot.forward, iter(range(10**9))

            def fail(*given: Any, **options: Any) -> Any:
                if next(calls) == number:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return forward(*given, **options)

            Slot.forward = fail  # type: ignore[method-assign]

    struck = Attempt(
        arm, statuses=frozenset({FINISHED, REFUSED, FAULT}), named=f"rank {rank}.*memory"
    )
    return Injection([struck])


KINDS: dict[str, Kind] = {
    "SIGKILL of a rank": sigkill,
    "SIGKILL of all ranks": sigkill_all,
    "SIGTERM": sigterm,
    "SIGUSR1 to a rank": sigusr1,
    "stop file": stop_file,
    "file system full": full_disk,
    "EIO while reading": read_error,
    "EIO while writing": write_error,
    "short reads": short_reads,
    "truncated source shard": truncated_shard,
    "source changed between attempts": changed_source,
    "own shard damaged between attempts": damaged_output,
    "snapshot damaged between attempts": damaged_snapshot,
    "journal damaged between attempts": damaged_journal,
    "wall clock set by a day": clock_jump,
    "rank slow for seconds": slow_rank,
    "rank frozen": frozen_rank,
    "device out of memory": out_of_memory,
}


def _interrupted(scene: Scene) -> Attempt:
    ranks = list(range(scene.world))
    return Attempt(
        outside=_signal(signal.SIGKILL, ranks, scene.moment()),
        statuses=frozenset({FINISHED, KILLED}),
    )


def _damaged(scene: Scene, pattern: str) -> Injection:
    def damage() -> None:
        files = [path for path in sorted(scene.work.glob(pattern)) if path.stat().st_size]
        if files:
            path = scene.random.choice(files)
            _flip(path, scene.random.randrange(path.stat().st_size))

    return Injection([_interrupted(scene)], [damage])


def _flip(path: Path, position: int) -> None:
    """One bit of a file; its time of change stays."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _restore(path: Path, data: bytes) -> None:
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _committed_layers(work: Path) -> list[int]:
    markers = sorted(work.glob("journal/layer-*.commit.json"))
    return [int(path.name.split(".")[0].partition("-")[2]) for path in markers]


def _signal(
    number: signal.Signals, ranks: list[int], moment: float, *, once_begun: Path | None = None
) -> Callable[[list[int]], float | None]:
    def strike(pids: list[int]) -> float | None:
        struck = _wait(pids, moment, once_begun=once_begun)
        if struck is not None:
            for rank in ranks:
                _send(pids[rank], number)
        return struck

    return strike


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait(pids: list[int], moment: float, *, once_begun: Path | None = None) -> float | None:
    """Until the moment has come, and the run has signs of life where that is asked for."""
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline or (
        once_begun is not None and not any(once_begun.glob("state/rank-*.json"))
    ):
        if not all(_is_alive(pid) for pid in pids):
            return None
        time.sleep(0.01)
    return time.monotonic() if all(_is_alive(pid) for pid in pids) else None


def _is_alive(pid: int) -> bool:
    return process_state(pid) not in "ZX"


def _shim(name: str, number: int, problem: OSError) -> None:
    """Makes one call of a function of `os` fail."""
    function, calls = getattr(os, name), iter(range(10**9))

    def fail(*given: Any) -> Any:
        if name == "write" and given[0] <= 2:
            return function(*given)
        if next(calls) == number:
            raise problem
        return function(*given)

    setattr(os, name, fail)
