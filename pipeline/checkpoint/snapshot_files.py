"""Snapshots on disk: a file of each rank, then a marker; what has no marker is removed.

In: what every rank wrote, and what makes it valid, as plain values. Out: on a restart, which
snapshots are whole, and a rank's tensors once their checksum was found to be right.

    snapshots/layer-00041/rank-00003.safetensors
    snapshots/layer-00041/snapshot.json             the marker: key, bytes and checksums
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.durable import sync_directory, write_failed, write_json
from pipeline.checkpoint.regular_files import open_regular
from pipeline.checkpoint.safetensors_file import CHUNK_BYTES, from_bytes, read_header, read_into
from pipeline.checkpoint.strict_json import read_json_file
from pipeline.errors import OutputError

_MARKER = "snapshot.json"
_DIRECTORY = re.compile(r"layer-(\d{5,})")


@dataclasses.dataclass(frozen=True)
class SnapshotFile:
    """One rank's part.

    Attributes:
        bytes: Size of the file.
        sha256: Hexadecimal digest of the whole file.
    """

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SnapshotRecord:
    """A whole snapshot.

    Attributes:
        layer: After which it was taken.
        key: What makes it valid, as JSON has it.
        files: By rank.
    """

    layer: int
    key: Mapping[str, Any]
    files: tuple[SnapshotFile, ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


def file_name(rank: int) -> str:
    """Of a rank's part, inside the snapshot's directory."""
    return f"rank-{rank:05d}.safetensors"


class SnapshotFiles:
    """The snapshots of one run; one rank makes the changes.

    Args:
        directory: Where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def of_layer(self, layer: int) -> Path:
        """Directory of one snapshot."""
        return self.directory / f"layer-{layer:05d}"

    def found(self) -> list[SnapshotRecord]:
        """Those that are whole, of any key, the newest first; what is torn is removed."""
        records = []
        for path in self.directory.glob("layer-*"):
            match = _DIRECTORY.fullmatch(path.name)
            record = _read_marker(path / _MARKER)
            if match and record is not None and record.layer == int(match[1]):
                records.append(record)
            else:
                _remove(path)
        return sorted(records, key=lambda record: -record.layer)

    def free_bytes(self) -> int:
        """Room on their file system, as it says itself (a quota does not show)."""
        return shutil.disk_usage(self.directory).free

    def begin(self, layer: int) -> None:
        """An empty directory for the snapshot after a layer.

        Raises:
            OutputError: It cannot be made.
        """
        path = self.of_layer(layer)
        self.remove(layer)
        try:
            path.mkdir(parents=True)
            sync_directory(path.parent)
        except OSError as problem:
            raise write_failed(path, "a snapshot", problem) from problem

    def commit(self, record: SnapshotRecord) -> None:
        """Declares a snapshot whole, once the files of all ranks are durable.

        Raises:
            OutputError: The marker could not be written.
        """
        files = [dataclasses.asdict(file) for file in record.files]
        value = {"layer": record.layer, "key": record.key, "files": files}
        write_json(self.of_layer(record.layer) / _MARKER, value)

    def remove(self, layer: int) -> None:
        """Forgets a snapshot: its marker first."""
        _remove(self.of_layer(layer))


def load(path: Path, expected: SnapshotFile) -> dict[str, torch.Tensor]:
    """The tensors of a file, in host memory; it is read once, and its checksum compared.

    Raises:
        OutputError: Missing, unreadable or damaged.
    """
    digest = hashlib.sha256()
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                raise _damaged(path, f"{size} bytes instead of {expected.bytes}")
            data = torch.empty(size, dtype=torch.uint8)
            view = memoryview(data.numpy())
            for start in range(0, len(view), CHUNK_BYTES):
                part = view[start : start + CHUNK_BYTES]
                read_into(file.fileno(), part, start)
                digest.update(part)
    except OSError as problem:
        raise _damaged(path, problem.strerror or str(problem)) from problem
    if digest.hexdigest() != expected.sha256:
        raise _damaged(path, "another checksum")
    infos = read_header(path, OutputError).values()
    return {i.name: from_bytes(data[i.start : i.stop], i.dtype, i.shape) for i in infos}


def unwritten_bytes(directory: Path, planned: int) -> int:
    """Bytes that are still to come into a directory."""
    written = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # it has got its name meanwhile
                written += entry.stat().st_size
    return max(0, planned - written)


def _damaged(path: Path, value: str) -> OutputError:
    return OutputError(str(path), value=value)


def _read_marker(path: Path) -> SnapshotRecord | None:
    try:
        value = read_json_file(path)
        files = tuple(SnapshotFile(int(f["bytes"]), str(f["sha256"])) for f in value["files"])
        return SnapshotRecord(int(value["layer"]), dict(value["key"]), files)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        (path / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
