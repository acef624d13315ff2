"""The source of the weights: what it holds, and exact slices of it.

In: a directory, a Hub id or `demo`. Out: a `FileSource`: its config, the place of every tensor, the
small files to copy along, and `read`, which gives one rank's shard of one tensor and touches no
other byte of it. Opening reads headers only. `Source` is what the sweep needs of it; the random
weights of a rehearsal (`pipeline.checkpoint.synthetic`) offer the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.checkpoint.hub import locate
from pipeline.checkpoint.read_record import ReadRecord
from pipeline.checkpoint.regular_files import OpenFiles, open_regular, read_regular
from pipeline.checkpoint.safetensors_file import TensorInfo, unreadable
from pipeline.checkpoint.slices import read_shard
from pipeline.checkpoint.small_files import find_small_files
from pipeline.checkpoint.source_files import INDEX_NAME, first_five, read_json, read_tensors
from pipeline.checkpoint.strict_json import MAX_BYTES
from pipeline.checkpoint.writable import StreamedTensor
from pipeline.errors import SourceError
from pipeline.sharding import Shard

__all__ = [
    "INDEX_NAME",
    "FileSource",
    "Source",
    "TensorHeader",
    "first_five",
    "no_such_tensor",
    "open_source",
    "read_json",
]


class TensorHeader(Protocol):
    """What a source tells of a tensor: its name, its dtype (as safetensors writes it), its size."""

    @property
    def name(self) -> str:
        """Full name."""

    @property
    def dtype(self) -> str:
        """As safetensors writes it, e.g. `"BF16"`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


class Source(Protocol):
    """Where a model's weights come from. Threads may use one source at the same time."""

    @property
    def location(self) -> str:
        """Where that is, for messages and the report."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """Every tensor by name."""

    @property
    def small_files(self) -> Mapping[str, Path]:
        """Relative to absolute path of everything else that a checkpoint carries along."""

    @property
    def reads(self) -> ReadRecord | None:
        """Takes digests of what is read; None where nobody asks."""

    def info(self, name: str) -> TensorHeader:
        """Dtype and shape of one tensor."""

    def read(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        """One tensor, or the part of it that `shard` describes, in the source's dtype, on the CPU.

        Raises:
            SourceError: No such tensor, a shard that does not fit it, or unreadable.
        """

    def copy_of(self, name: str) -> StreamedTensor:
        """One tensor as something that `write_safetensors` takes."""

    def digest(self) -> str:
        """Tells one source from another without reading it whole."""

    def close(self) -> None:
        """Lets go of what is open."""


@dataclasses.dataclass(frozen=True)
class FileSource:
    """An opened checkpoint.

    Attributes:
        directory: Where it lies.
        config: The parsed config.json.
        tensors: Every tensor by name, in the order of the files.
        small_files: Relative path to absolute path of everything else that a published checkpoint
            carries along (tokenizer, generation config, remote code).
        reads: Takes digests of what is read; None where nobody asks.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    small_files: dict[str, Path]
    _files: OpenFiles
    reads: ReadRecord | None = None

    @property
    def location(self) -> str:
        """The directory."""
        return str(self.directory)

    def read(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        """One tensor, or exactly the part of it that `shard` describes, in the source's dtype.

        Raises:
            SourceError: No such tensor, a shard that does not fit it, or the file ended early.
        """
        info = self.info(name)
        try:
            descriptor = self._files.descriptor(info.path)
        except OSError as problem:
            raise unreadable(info, problem) from problem
        return read_shard(descriptor, info, shard, self.reads)

    def recorded(self) -> FileSource:
        """The same source, with digests of everything that is read from now on."""
        return dataclasses.replace(self, reads=ReadRecord())

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._files.close()

    def info(self, name: str) -> TensorInfo:
        """Place, dtype and shape of one tensor.

        Raises:
            SourceError: No such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise no_such_tensor(self.location, name)
        return info

    def copy_of(self, name: str) -> TensorInfo:
        """The place of one tensor, which the writer copies from.

        Raises:
            SourceError: No such tensor.
        """
        return self.info(name)

    def digest(self) -> str:
        """Digest of config.json, and of what tells one weight file from another.

        That is its name, size, time of change, first and last 64 KiB. A source that was copied
        elsewhere in between is another one.
        """
        digest = hashlib.sha256(read_regular(self.directory / "config.json", MAX_BYTES))
        for path in sorted({info.path for info in self.tensors.values()}):
            status = path.stat()
            size = status.st_size
            digest.update(f"{path.name} {size} {status.st_mtime_ns}".encode())
            with open(open_regular(path), "rb") as file:
                digest.update(file.read(65536))
                file.seek(max(0, size - 65536), os.SEEK_SET)
                digest.update(file.read(65536))
        return digest.hexdigest()


def open_source(path_or_hub_id: str | Path) -> FileSource:
    """Opens a checkpoint: a directory, a Hub id, or `demo` for the packaged model.

    Raises:
        SourceError: Not found, or its files contradict each other.
    """
    directory = locate(path_or_hub_id)
    config = read_json(directory / "config.json", "a checkpoint directory has one")
    return FileSource(
        directory=directory,
        config=config,
        tensors=read_tensors(directory),
        small_files=find_small_files(directory),
        _files=OpenFiles(),
    )


def no_such_tensor(location: str, name: str) -> SourceError:
    """The error for a tensor that a source does not hold."""
    return SourceError(
        f"{location}: {name}",
        value="no such tensor",
        rule="must be present",
        remedy="fetch the checkpoint again, whole",
    )
