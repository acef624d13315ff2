"""Reading one rank's shard of a tensor: only its own bytes, straight to where they are wanted.

In: the place of a tensor in a file, and a `Shard`. Out: a `Cut` (which bytes of the tensor are the
shard's), the pieces in which it is read (plan), and the reading of one piece (act), so that threads
may read one shard together. A cut of the first dim is one stretch of the file per range; a cut of a
later dim takes runs out of every row, and where those are small, whole rows are read and then cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from pipeline.checkpoint.read_record import ReadRecord, digest_piece, digest_pieces
from pipeline.checkpoint.safetensors_file import (
    CHUNK_BYTES,
    TORCH_DTYPES,
    TensorInfo,
    fill_from,
    from_bytes,
)
from pipeline.errors import SourceError
from pipeline.sharding import Shard

Bytes = npt.NDArray[np.uint8]

# Runs of this size are read one by one. Smaller ones come with their rows: system calls take
# longer than reading twice, and the other ranks of the host want the rest from the page cache.
_SMALLEST_RUN_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """Which bytes of a tensor are a shard's: the same runs out of every row.

    Attributes:
        info: The tensor.
        shape: Shape of the shard.
        rows: Number of rows; 1 where the first dim is cut, or nothing.
        row_bytes: Size of a row in the file.
        runs: Half-open byte ranges of a row, in the order of the shard.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    rows: int
    row_bytes: int
    runs: tuple[tuple[int, int], ...]

    @property
    def kept_row_bytes(self) -> int:
        """Size of what the shard has of a row."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def nbytes(self) -> int:
        """Size of the shard."""
        return self.rows * self.kept_row_bytes

    def kept(self, piece: Piece, shard: Bytes) -> memoryview:
        """What a piece is of a shard, once it was read."""
        size = piece.rows * self.kept_row_bytes or piece.nbytes
        return memoryview(shard[piece.position : piece.position + size])


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One read.

    Attributes:
        offset: First byte in the file.
        nbytes: How many bytes are read.
        position: Where they go, from the beginning of the shard, in bytes.
        rows: How many whole rows are read, to be cut; 0 where every byte is the shard's.
    """

    offset: int
    nbytes: int
    position: int
    rows: int = 0


class Scratch:
    """Room for rows before they are cut; every thread has its own."""

    def __init__(self) -> None:
        self._bytes: Bytes = np.empty(0, dtype=np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """The same bytes at every call."""
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(nbytes, dtype=np.uint8)
        return self._bytes[:nbytes]


def cut_of(info: TensorInfo, shard: Shard | None) -> Cut:
    """Where a shard lies in its tensor; None is the whole tensor.

    Raises:
        SourceError: The shard does not fit the tensor.
    """
    if shard is None or shard.is_whole:
        if shard is not None and shard.shape != info.shape:
            raise _misfit(info, shard)
        return Cut(info, info.shape, 1, info.nbytes, ((0, info.nbytes),))
    _check_fit(info, shard)
    inner = math.prod(info.shape[shard.dim + 1 :]) * TORCH_DTYPES[info.dtype].itemsize
    runs = tuple((start * inner, stop * inner) for start, stop in shard.ranges)
    rows = math.prod(info.shape[: shard.dim])
    return Cut(info, shard.shape, rows, info.shape[shard.dim] * inner, runs)


def pieces_of(cut: Cut, piece_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """The reads that make up a shard, each of at most `piece_bytes`, in file order by range."""
    kept = cut.kept_row_bytes
    if not cut.nbytes:
        return
    smallest = min(stop - start for start, stop in cut.runs)
    if cut.rows > 1 and smallest < _SMALLEST_RUN_BYTES and cut.row_bytes <= piece_bytes:
        batch = piece_bytes // cut.row_bytes
        for first in range(0, cut.rows, batch):
            count = min(batch, cut.rows - first)
            offset = cut.info.start + first * cut.row_bytes
            yield Piece(offset, count * cut.row_bytes, first * kept, count)
        return
    for row in range(cut.rows):
        base, position = cut.info.start + row * cut.row_bytes, row * kept
        for start, stop in cut.runs:
            for first in range(start, stop, piece_bytes):
                size = min(piece_bytes, stop - first)
                yield Piece(base + first, size, position + first - start)
            position += stop - start


def read_piece(descriptor: int, cut: Cut, piece: Piece, shard: Bytes, scratch: Scratch) -> None:
    """Reads one piece to its place in a shard.

    Args:
        descriptor: The open file.
        cut: What is read.
        piece: Which part of it.
        shard: All bytes of the shard, uint8 `[cut.nbytes]`; written at the piece's place.
        scratch: The calling thread's.

    Raises:
        SourceError: The file ended early, or cannot be read.
    """
    if not piece.rows:
        target = shard[piece.position : piece.position + piece.nbytes]
        fill_from(descriptor, cut.info, memoryview(target), piece.offset)
        return
    whole = scratch.take(piece.nbytes)
    fill_from(descriptor, cut.info, memoryview(whole), piece.offset)
    kept = cut.kept_row_bytes
    target = shard[piece.position : piece.position + piece.rows * kept].reshape(piece.rows, kept)
    whole, column = whole.reshape(piece.rows, cut.row_bytes), 0
    for start, stop in cut.runs:
        target[:, column : column + stop - start] = whole[:, start:stop]
        column += stop - start


def read_shard(
    descriptor: int, info: TensorInfo, shard: Shard | None, reads: ReadRecord | None = None
) -> torch.Tensor:
    """Reads a shard, or the whole tensor for None, in the calling thread.

    Args:
        descriptor: The open file.
        info: The tensor.
        shard: Which part of it.
        reads: Takes the digest of what was read.

    Raises:
        SourceError: The shard does not fit the tensor, the file ended early, or its bytes are not
            those that were read before.
    """
    cut, scratch, digests = cut_of(info, shard), Scratch(), []
    flat = torch.empty(cut.nbytes, dtype=torch.uint8)
    for piece in pieces_of(cut):
        read_piece(descriptor, cut, piece, flat.numpy(), scratch)
        if reads is not None:
            digests.append(digest_piece(cut.kept(piece, flat.numpy())))
    if reads is not None:
        reads.add(info, shard, digest_pieces(digests))
    return from_bytes(flat, info.dtype, cut.shape)


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
