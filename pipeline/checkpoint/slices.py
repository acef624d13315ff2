"""Reading one rank's shard of a tensor: only its own bytes, straight into the tensor.

In: an open file, the place of a tensor in it, and a `Shard`. Out: a torch tensor of the shard's
shape in the stored dtype. A cut of the first dim is one read per range; a cut of a later dim is
one read per row and range, or, where those pieces are small, a read of whole rows that are then
cut.
"""

from __future__ import annotations

import math

import torch

from pipeline.checkpoint.safetensors_file import (
    CHUNK_BYTES,
    TORCH_DTYPES,
    TensorInfo,
    from_bytes,
    read_into,
    truncated,
)
from pipeline.errors import SourceError
from pipeline.sharding import Shard

# Below one page a read per row costs more calls than it saves bytes.
_SMALLEST_PIECE_BYTES = 4096


def read_shard(descriptor: int, info: TensorInfo, shard: Shard | None) -> torch.Tensor:
    """Reads a shard, or the whole tensor for None.

    Raises:
        SourceError: The shard does not fit the tensor, or the file ended early.
    """
    if shard is None or shard.is_whole:
        if shard is not None and shard.shape != info.shape:
            raise _misfit(info, shard)
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
        _fill(descriptor, info, memoryview(flat.numpy()), info.start)
        return from_bytes(flat, info.dtype, info.shape)
    _check_fit(info, shard)
    itemsize = TORCH_DTYPES[info.dtype].itemsize
    inner = math.prod(info.shape[shard.dim + 1 :]) * itemsize
    outer = math.prod(info.shape[: shard.dim])
    source_row, shard_row = info.shape[shard.dim] * inner, shard.shape[shard.dim] * inner
    flat = torch.empty(outer * shard_row, dtype=torch.uint8)
    smallest = min((stop - start) * inner for start, stop in shard.ranges)
    if outer > 1 and smallest < _SMALLEST_PIECE_BYTES:
        _read_rows(descriptor, info, shard, flat.view(outer, shard_row), inner)
        return from_bytes(flat, info.dtype, shard.shape)
    view, position = memoryview(flat.numpy()), 0
    for row in range(outer):
        base = info.start + row * source_row
        for start, stop in shard.ranges:
            size = (stop - start) * inner
            _fill(descriptor, info, view[position : position + size], base + start * inner)
            position += size
    return from_bytes(flat, info.dtype, shard.shape)


def _read_rows(
    descriptor: int, info: TensorInfo, shard: Shard, rows: torch.Tensor, inner: int
) -> None:
    """Reads whole rows in pieces and keeps the ranges; `rows` is uint8 `[outer, shard_row]`."""
    source_row = info.shape[shard.dim] * inner
    batch = max(1, CHUNK_BYTES // source_row)
    for first in range(0, len(rows), batch):
        count = min(batch, len(rows) - first)
        piece = torch.empty(count, source_row, dtype=torch.uint8)
        _fill(
            descriptor,
            info,
            memoryview(piece.view(-1).numpy()),
            info.start + first * source_row,
        )
        parts = [piece[:, start * inner : stop * inner] for start, stop in shard.ranges]
        torch.cat(parts, dim=1, out=rows[first : first + count])


def _fill(descriptor: int, info: TensorInfo, view: memoryview, offset: int) -> None:
    if read_into(descriptor, view, offset) != len(view):
        raise truncated(info)


def _check_fit(info: TensorInfo, shard: Shard) -> None:
    shape = list(info.shape)
    if shard.dim >= len(shape) or any(
        not 0 <= start <= stop <= shape[shard.dim] for start, stop in shard.ranges
    ):
        raise _misfit(info, shard)
    shape[shard.dim] = sum(stop - start for start, stop in shard.ranges)
    if tuple(shape) != shard.shape:
        raise _misfit(info, shard)


def _misfit(info: TensorInfo, shard: Shard) -> SourceError:
    return SourceError(
        f"{info.path}: {info.name}",
        value=f"shape {list(info.shape)}",
        rule=f"a shard {list(shard.shape)} of dim {shard.dim}, ranges {list(shard.ranges)}, "
        "must fit into it",
        remedy="config.json does not belong to these weights",
    )
