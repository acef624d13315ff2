"""Files that are whole or not there: written under another name, synced, then renamed.

In: a path and what goes into it. Out: the file, or an `OutputError` and nothing left behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.checkpoint.regular_files import open_regular
from pipeline.errors import OutputError, SourceError

_COPY_BYTES = 1 << 20


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a small file, synced, in one step.

    Raises:
        OutputError: The disk is full, or writing failed otherwise.
    """
    with replacing(path, "file") as descriptor:
        write_all(descriptor, data)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object, *, allow_nan: bool = False) -> None:
    """Writes JSON as `write_bytes` does; refuses NaN and Inf (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan)
    write_bytes(path, text.encode() + b"\n")


def copy_file(source: Path, path: Path) -> None:
    """Copies a small file as `write_bytes` writes it, with the rights of a new file.

    Raises:
        SourceError: It cannot be read any more.
        OutputError: The disk is full, or writing failed otherwise.
    """
    try:
        file = os.fdopen(open_regular(source), "rb", buffering=0)
    except OSError as problem:
        raise SourceError(
            str(source),
            value=problem.strerror,
            rule="every small file is copied along",
            remedy="fetch it again, then start the same command again",
        ) from problem
    with file, replacing(path, "file") as descriptor:
        while data := file.read(_COPY_BYTES):
            write_all(descriptor, data)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(open_regular(path), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path], threads: int) -> list[str]:
    """SHA-256 of several files, largest first, so that threads end together; in the given order."""
    order = sorted(paths, key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(order, pool.map(file_sha256, order), strict=True))
    return [digests[path] for path in paths]


def reading_threads() -> int:
    """How many threads read and hash files: one per core that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def sync_directory(directory: Path) -> None:
    """Makes renames inside a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, what: str) -> Iterator[int]:
    """Yields a descriptor to write to; `path` is replaced in one step when the context ends well.

    Raises:
        OutputError: The disk is full, or writing failed otherwise.
    """
    temporary = temporary_of(path)
    try:
        descriptor = create(temporary)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        rename(temporary, path)
    except OSError as problem:
        raise write_failed(path, what, problem) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """The name that a file has until it is whole; no other process uses it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def create(path: Path) -> int:
    """Makes an empty file and opens it for writing, with the rights that the umask leaves.

    What lies there is removed first and never written through: it may be a link to another file.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def open_to_append(path: Path) -> int:
    """Opens a file, which may not exist, to write at its end; refuses a link (OSError)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def rename(temporary: Path, path: Path) -> None:
    """Gives a synced file its name, durably."""
    os.rename(temporary, path)
    sync_directory(path.parent)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of `data` (`os.write` may stop short)."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view[: 1 << 30]) :]


def write_failed(path: Path, what: str, problem: OSError) -> OutputError:
    """The error for a file that the system did not write."""
    try:
        room = f"{shutil.disk_usage(path.parent).free / 1e9:.2f} GB free on its file system"
    except OSError:
        room = f"{path.parent} does not exist"
    return OutputError(
        str(path),
        value=f"writing {what} failed: {problem.strerror or problem}; {room}",
        rule="the output must be written whole",
        remedy="free space or mend the file system, then start the same command again",
    )
