"""Checksums that came with a source: what its files were when somebody else named them.

In: the files of a checkpoint. Out: SHA-256 by file, from either of two places: the name of the blob
that a link of the Hub's cache leads to, or a list in the checkpoint's directory as `sha256sum`
writes it (`SHA256SUMS`, `*.sha256`). And the comparison, in several threads, for a part of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from pipeline.checkpoint.regular_files import open_regular, read_regular
from pipeline.checkpoint.safetensors_file import CHUNK_BYTES
from pipeline.checkpoint.strict_json import shown
from pipeline.errors import SourceError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(r"\\?([0-9a-fA-F]{64})(?: [ *](.+))?")
_MAX_LIST_BYTES = 16 << 20


def find_checksums(directory: Path, files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of those files for which one was given; lists in the directory go first.

    Raises:
        SourceError: A list does not parse, or two of them contradict each other.
    """
    listed = _read_lists(directory)
    found = {}
    for path in files:
        digest = listed.get(path.relative_to(directory).as_posix()) or _blob_name(path)
        if digest is not None:
            found[path] = digest
    return found


def find_changed(
    checksums: Mapping[Path, str],
    threads: int,
    advance: Callable[[int], None] = lambda nbytes: None,
    interval_s: float = 5.0,
    tell: Callable[[], None] = lambda: None,
) -> list[str]:
    """Reads files whole and compares them; returns what is wrong, a line per file.

    Args:
        checksums: SHA-256 by file.
        threads: Files that are read at a time.
        advance: Called with every number of bytes that were read, one thread at a time.
        interval_s: Between two calls of `tell`.
        tell: Called now and then, from the calling thread.
    """
    lock = threading.Lock()

    def fault_of(path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
        try:
            with os.fdopen(open_regular(path), "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    with lock:
                        advance(count)
        except OSError as problem:
            return f"{path}: {problem.strerror}"
        if digest.hexdigest() == checksums[path]:
            return ""
        return f"{path}: SHA-256 {digest.hexdigest()} instead of {checksums[path]}"

    largest_first = sorted(checksums, key=_size, reverse=True)
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        results = [pool.submit(fault_of, path) for path in largest_first]
        while wait(results, interval_s).not_done:
            tell()
    return sorted(fault for result in results if (fault := result.result()))


def share_of(checksums: Mapping[Path, str], rank: int, size: int) -> dict[Path, str]:
    """The files that one of `size` ranks reads: the largest first, each to whom has least."""
    shares: list[dict[Path, str]] = [{} for _ in range(size)]
    loads = [0] * size
    for path in sorted(checksums, key=lambda path: (-_size(path), path)):
        least = loads.index(min(loads))
        loads[least] += max(_size(path), 1)
        shares[least][path] = checksums[path]
    return shares[rank]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will say what is wrong


def _blob_name(path: Path) -> str | None:
    """The Hub names blobs of large files by their SHA-256, others by a shorter Git hash."""
    blob = Path(os.path.realpath(path))
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def _read_lists(directory: Path) -> dict[str, str]:
    listed: dict[str, str] = {}
    for path in sorted([*directory.glob("SHA256SUMS"), *directory.glob("*.sha256")]):
        for name, digest in _read_list(path).items():
            if listed.setdefault(name, digest) != digest:
                raise SourceError(
                    str(path),
                    value=f"another SHA-256 of {name} than in another list",
                    rule="lists of checksums in a checkpoint must agree",
                    remedy="remove the one that is out of date",
                )
    return listed


def _read_list(path: Path) -> dict[str, str]:
    try:
        lines = read_regular(path, _MAX_LIST_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise _torn(path, getattr(problem, "strerror", None) or str(problem)) from problem
    listed: dict[str, str] = {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        # A digest alone is that of the file which the list is named after.
        name = path.stem if match is not None and match[2] is None else match and match[2]
        if match is None or name is None:
            raise _torn(path, shown(line))
        listed[name.removeprefix("./")] = match[1].lower()
    return listed


def _torn(path: Path, value: str) -> SourceError:
    return SourceError(
        str(path),
        value=value,
        rule="every line holds a SHA-256 and a file name, as sha256sum writes them",
        remedy="fetch the list again, or remove it",
    )
