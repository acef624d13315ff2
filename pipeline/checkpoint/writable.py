"""What can be written to a safetensors file, and how such a file is laid out.

In: dtypes and shapes by name. Out: the order of the tensors and the header; and `FileRecord`, which
tells what a written file holds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from pipeline.checkpoint.safetensors_file import DTYPE_NAMES, TORCH_DTYPES, as_bytes, is_shape
from pipeline.checkpoint.source_files import is_weight_file
from pipeline.checkpoint.strict_json import is_whole_number, shown

_SHA256 = re.compile(r"[0-9a-f]{64}")

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype (as safetensors writes it) and logical shape, by name."""


class StreamedTensor(Protocol):
    """A tensor whose bytes come in pieces: a place in another file, or one that is made."""

    @property
    def dtype(self) -> str:
        """As safetensors writes it, e.g. `"BF16"`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes in pieces of whole elements; each piece may be reused by the next."""


@dataclasses.dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes.

    Attributes:
        dtype: As safetensors writes it, e.g. `"BF16"`.
        shape: Logical shape.
        data: Exactly its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.data)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """All bytes at once."""
        yield self.data


Writable = torch.Tensor | RawTensor | StreamedTensor


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What one written file holds.

    Attributes:
        name: File name inside its directory.
        bytes: Size of the file.
        sha256: Hexadecimal digest of the whole file.
        tensors: Dtype (as safetensors writes it) and shape of every tensor.
    """

    name: str
    bytes: int
    sha256: str
    tensors: Layout

    def to_json(self) -> dict[str, Any]:
        """Plain values for the journal."""
        return {
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "tensors": {
                name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, value: Any) -> FileRecord:
        """The inverse of `to_json`.

        Raises:
            ValueError: Anything that `to_json` does not make.
        """
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)} in the place of a file's record")
        name, size, sha256 = (value.get(key) for key in ("name", "bytes", "sha256"))
        if not (isinstance(name, str) and is_weight_file(name)):
            raise ValueError(f"{shown(name)} is no name of a weight file")
        if not (is_whole_number(size) and size >= 0):
            raise ValueError(f"{name}: {shown(size)} bytes")
        if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise ValueError(f"{name}: SHA-256 {shown(sha256)}")
        tensors = value.get("tensors")
        if not isinstance(tensors, dict):
            raise ValueError(f"{name}: tensors {shown(tensors)}")
        return cls(name, size, sha256, {key: _entry(key, item) for key, item in tensors.items()})


def dtype_and_shape(tensor: Writable) -> tuple[str, tuple[int, ...]]:
    """Its entry in a layout."""
    if isinstance(tensor, torch.Tensor):
        return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    return tensor.dtype, tuple(tensor.shape)


def chunks_of(tensor: Writable) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor in pieces; each piece may be reused by the next."""
    if isinstance(tensor, torch.Tensor):
        yield as_bytes(tensor)
    else:
        yield from tensor.chunks()


def file_order(layout: Layout) -> list[str]:
    """Names in the order in which a file holds them: larger elements first, then as given.

    That keeps every buffer aligned, as the reference implementation does.
    """
    return sorted(layout, key=lambda name: -TORCH_DTYPES[layout[name][0]].itemsize)


def nbytes_of(entry: tuple[str, tuple[int, ...]]) -> int:
    """Size of a tensor by its entry in a layout."""
    dtype, shape = entry
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize


def file_header(names: Sequence[str], layout: Layout) -> tuple[bytes, int]:
    """The length prefix and JSON header, padded to 8 bytes; and the bytes that follow."""
    # "format": transformers refuses to load files without it.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        dtype, shape = layout[name]
        size = nbytes_of(layout[name])
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _entry(name: str, value: object) -> tuple[str, tuple[int, ...]]:
    """A layout's entry, from JSON."""
    dtype, shape = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if not (isinstance(dtype, str) and dtype in TORCH_DTYPES and is_shape(shape)):
        raise ValueError(f"{shown(name)}: {shown(value)} in the place of dtype and shape")
    return dtype, tuple(shape)
