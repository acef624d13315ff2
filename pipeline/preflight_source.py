"""Whether a rank can read what it will need: every file of the source, at both ends of its part.

In: the job and the rank. Out: what cannot be read, in words, and a mark of each file, by which the
ranks notice that they see different ones. A few bytes of each file are read, not one of each
tensor: a header that describes the file to its last byte was read before.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.checkpoint.regular_files import open_regular
from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.checkpoint.source import FileSource
from pipeline.errors import SourceError
from pipeline.job import Job
from pipeline.reading import requests_of

THREADS = 16
PATIENCE_S = 60.0
MARK_BYTES = 4096

Extent = tuple[int, int]
"""First byte, and the one after the last."""


class Probe(NamedTuple):
    """What came of it.

    Attributes:
        faults: What cannot be read, and why.
        marks: Size and digest of the last bytes, by the file's name and directory.
    """

    faults: list[str]
    marks: dict[str, str]


def extents_of(job: Job, source: FileSource, rank: int) -> dict[Path, Extent]:
    """The part of each file that holds every tensor of which a rank reads anything."""
    forward = job.resolution.needs_forward
    extents: dict[Path, Extent] = {}
    whole = [name for name, owner in job.outer if owner == rank]
    if forward:  # the embedding at the beginning, norm and head at the end
        whole += [name for name in job.stored if not name.startswith(("backbone.layers.", "mtp."))]
    for schedule in job.schedules:
        whole += [spec.name for spec, owner in schedule.copies if owner == rank]
        for _, name, _ in requests_of(job, schedule, rank, all_shards=forward):
            info = source.info(name)
            _add(extents, info.path, info.start, info.stop)
    return _add_whole(extents, (source.info(job.stored[name].name) for name in whole))


def extents_of_all(source: FileSource) -> dict[Path, Extent]:
    """All of each file."""
    return _add_whole({}, source.tensors.values())


def probe(extents: Mapping[Path, Extent], patience_s: float = PATIENCE_S) -> Probe:
    """Opens every file and reads a little of it, in threads.

    Args:
        extents: What is needed of each file.
        patience_s: For all of them together: a file system that hangs would hold the run.
    """
    todo: queue.SimpleQueue[tuple[Path, Extent]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Path, str, str]] = queue.SimpleQueue()
    for item in extents.items():
        todo.put(item)

    def work() -> None:
        while True:
            try:
                path, extent = todo.get_nowait()
            except queue.Empty:
                return
            done.put((path, *_look_at(path, extent)))

    for _ in range(min(THREADS, len(extents))):
        # (not to be waited for at the end: a read that hangs cannot be called back)
        threading.Thread(target=work, name="preflight", daemon=True).start()
    faults, marks = [], {}
    waiting, end = set(extents), time.monotonic() + patience_s
    while waiting:
        try:
            path, fault, mark = done.get(timeout=max(end - time.monotonic(), 0.001))
        except queue.Empty:
            faults.append(_hangs(sorted(waiting), patience_s))
            break
        waiting.discard(path)
        if fault:
            faults.append(fault)
        else:
            marks[f"{path.parent.name}/{path.name}"] = mark
    return Probe(sorted(faults), marks)


def _look_at(path: Path, extent: Extent) -> tuple[str, str]:
    """What is wrong with a file; its mark."""
    first, stop = extent
    try:
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            ends = [first, stop - 1] if stop > first else []
            if any(len(os.pread(descriptor, 1, at)) != 1 for at in ends):
                return _truncated(path, size, stop), ""
            start = max(0, size - MARK_BYTES)
            digest = hashlib.sha256(os.pread(descriptor, MARK_BYTES, start)).hexdigest()
        finally:
            os.close(descriptor)
    except OSError as problem:
        return _unreadable(path, problem), ""
    return "", f"{size} {digest[:16]}"


def _truncated(path: Path, size: int, stop: int) -> str:
    return str(
        SourceError(
            str(path),
            value=f"{size:,} bytes",
            rule=f"this rank reads up to byte {stop:,}",
            remedy="the file is truncated, or another one lies there: fetch it again",
        )
    )


def _unreadable(path: Path, problem: OSError) -> str:
    return str(
        SourceError(
            str(path),
            value=problem.strerror or str(problem),
            rule="every rank reads its part of the source itself",
            remedy="make it readable for this user on every host, or mend its mount",
        )
    )


def _hangs(paths: list[Path], patience_s: float) -> str:
    return str(
        SourceError(
            str(paths[0].parent),
            value=f"no answer for {len(paths)} files, the first {paths[0].name}, "
            f"in {patience_s:.0f} s",
            rule="a file system must answer",
            remedy="see whether it hangs (ls of the directory on that host), mount it again",
        )
    )


def _add(extents: dict[Path, Extent], path: Path, first: int, stop: int) -> None:
    before = extents.get(path, (first, stop))
    extents[path] = min(before[0], first), max(before[1], stop)


def _add_whole(extents: dict[Path, Extent], infos: Iterable[TensorInfo]) -> dict[Path, Extent]:
    for info in infos:
        _add(extents, info.path, info.start, info.stop)
    return extents
