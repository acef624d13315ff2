"""The safetensors container: its header, its dtypes, and exact byte ranges.

In: a path. Out: one `TensorInfo` per tensor (dtype, shape, absolute byte range), after checking
everything that the header promises against the file. Only the header is read, so opening the
50,000 tensors of a large model costs well under a second per file.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON
header `{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`, then the buffers, without
holes and without overlap.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch

from pipeline.checkpoint.regular_files import open_regular
from pipeline.checkpoint.strict_json import MAX_BYTES, is_whole_number, parse_json, shown
from pipeline.errors import LayersweepError, SourceError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# The reference implementation refuses longer headers (safetensors/src/tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = MAX_BYTES
# No tensor of a language model has more than 4.
MAX_DIMS = 8
MAX_NAME_CHARACTERS = 512

CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: Full name.
        dtype: As safetensors writes it, e.g. `"BF16"`.
        shape: Logical shape; `()` for a scalar.
        path: The file.
        start: First byte of the buffer, from the beginning of the file.
        stop: One past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in pieces, read from the file (see `iterate_chunks`)."""
        return iterate_chunks(self)


def read_header(path: Path, error: type[LayersweepError] = SourceError) -> dict[str, TensorInfo]:
    """Reads and checks the header of one file.

    Args:
        path: A safetensors file (or a link to one).
        error: The class to raise.

    Raises:
        LayersweepError: The file is unreadable, truncated, or its header contradicts itself.
    """
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise error(
                    str(path),
                    value=f"{size} bytes with a header of {length} bytes",
                    rule="the header must fit into the file",
                    remedy="the file is truncated or not safetensors; fetch it again",
                )
            if length > MAX_HEADER_BYTES:
                raise error(
                    str(path),
                    value=f"a header of {length:,} bytes",
                    rule=f"a header has at most {MAX_HEADER_BYTES:,} bytes",
                    remedy="split the tensors over more files",
                )
            text = file.read(length)
    except OSError as problem:
        raise error(
            str(path),
            value=problem.strerror,
            rule="must be readable",
            remedy="fetch it again (a link of the Hub cache may lead nowhere), or mend its rights",
        ) from problem
    try:
        entries = parse_json(text)
        if not isinstance(entries, dict):
            raise ValueError(f"a JSON {type(entries).__name__}")
        _check_metadata(entries.pop("__metadata__", None))
        infos = {
            name: _parse_entry(name, entry, path, 8 + length) for name, entry in entries.items()
        }
    except ValueError as problem:
        raise error(
            str(path),
            value=f"a header that does not parse ({problem})",
            rule="a safetensors header is JSON with dtype, shape and data_offsets per tensor",
            remedy="fetch the file again",
        ) from problem
    _check_offsets(path, infos, 8 + length, size, error)
    return infos


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fills `view` from `offset` of an open file; returns the bytes read (fewer at its end)."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            break
        done += count
    return done


def iterate_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of one tensor in pieces of at most 16 MiB; each piece is reused by the next.

    Raises:
        SourceError: The file ended early, or cannot be read.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, info.nbytes)))
    try:
        descriptor = open_regular(info.path)
    except OSError as problem:
        raise unreadable(info, problem) from problem
    try:
        for start in range(info.start, info.stop, CHUNK_BYTES):
            view = buffer[: min(CHUNK_BYTES, info.stop - start)]
            fill_from(descriptor, info, view, start)
            yield view
    finally:
        os.close(descriptor)


def fill_from(descriptor: int, info: TensorInfo, view: memoryview, offset: int) -> None:
    """Fills `view` with bytes of one tensor, from `offset` of its file.

    Raises:
        SourceError: The file ended early, or cannot be read.
    """
    try:
        count = read_into(descriptor, view, offset)
    except OSError as problem:
        raise unreadable(info, problem) from problem
    if count != len(view):
        raise truncated(info)


def truncated(info: TensorInfo) -> SourceError:
    """The error for a file that ended inside a tensor after its header had been checked."""
    return SourceError(
        f"{info.path}: {info.name}",
        value="end of file inside the tensor",
        rule=f"bytes {info.start} to {info.stop} must exist",
        remedy="the file changed while it was read; fetch it again",
    )


def unreadable(info: TensorInfo, problem: OSError) -> SourceError:
    """The error for a file that the system does not read, though its header had been checked."""
    return SourceError(
        f"{info.path}: {info.name}",
        value=problem.strerror or str(problem),
        rule="must be readable",
        remedy="mend the file system or fetch the file again, then start the same command again",
    )


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def from_bytes(buffer: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over a flat uint8 buffer of exactly its size."""
    return buffer.view(TORCH_DTYPES[dtype]).reshape(shape)


def name_fault(name: str) -> str:
    """What is wrong with the name of a tensor or a file; empty where nothing is.

    Names go into messages, logs, indices and lists of checksums, which hold one a line.
    """
    if not name:
        return "an empty name"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"a name of {len(name):,} characters, more than {MAX_NAME_CHARACTERS}"
    if not name.isprintable():
        return f"the name {name!r} with a character that cannot be printed"
    return f"the name {name!r} with a backslash" if "\\" in name else ""


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value can be the shape of a tensor."""
    return isinstance(value, list) and len(value) <= MAX_DIMS and all(map(_is_size, value))


def _check_metadata(metadata: object) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise ValueError("__metadata__ is not texts by name")


def _parse_entry(name: str, entry: object, path: Path, base: int) -> TensorInfo:
    if fault := name_fault(name):
        raise ValueError(fault)
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: {shown(entry)} in the place of dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError(f"{name}: dtype {shown(dtype)}")
    if not is_shape(shape):
        raise ValueError(f"{name}: shape {shown(shape)}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise ValueError(f"{name}: data_offsets {shown(offsets)}")
    if offsets[0] > offsets[1]:
        raise ValueError(f"{name}: data_offsets {offsets}")
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], base + offsets[1])


def _is_size(value: Any) -> bool:
    return is_whole_number(value) and 0 <= value < 1 << 63


def _check_offsets(
    path: Path,
    infos: Mapping[str, TensorInfo],
    base: int,
    size: int,
    error: type[LayersweepError],
) -> None:
    expected = base
    for info in sorted(infos.values(), key=lambda info: (info.start, info.stop)):
        if info.start != expected:
            kind = "a hole" if info.start > expected else "an overlap"
            raise error(
                f"{path}: {info.name}",
                value=f"{kind} at byte {min(info.start, expected)}",
                rule="buffers follow each other without holes or overlaps",
                remedy="the file is corrupt; fetch it again",
            )
        if info.stop > size:
            raise error(
                f"{path}: {info.name}",
                value=f"a file of {size} bytes",
                rule=f"the tensor ends at byte {info.stop}",
                remedy="the file is truncated; fetch it again",
            )
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise error(
                f"{path}: {info.name}",
                value=f"dtype {shown(info.dtype)[1:-1]}",
                rule="known dtypes are " + ", ".join(TORCH_DTYPES),
                remedy="use a checkpoint in BF16",
            )
        if info.nbytes != info.elements * dtype.itemsize:
            raise error(
                f"{path}: {info.name}",
                value=f"{info.nbytes} bytes",
                rule=f"{info.dtype} {list(info.shape)} takes {info.elements * dtype.itemsize}",
                remedy="the file is corrupt; fetch it again",
            )
        expected = info.stop
    if expected != size:
        raise error(
            str(path),
            value=f"{size} bytes",
            rule=f"its header describes {expected}",
            remedy="the file is truncated or has trailing bytes; fetch it again",
        )
