"""Tensors that keep the source's bytes: looked at while they are copied, and read once.

In: the source and a tensor's name. Out: something for the writer to copy, which refuses NaN and Inf
as the bytes pass: no quantizer and no forward pass would meet them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from pipeline.checkpoint.read_record import ReadRecord, digest_piece, digest_pieces
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.writable import StreamedTensor
from pipeline.errors import NumericsError


@dataclasses.dataclass(frozen=True)
class CheckedCopy:
    """A tensor of the source on its way to a file.

    Attributes:
        name: Its name in the source.
        tensor: Where its bytes come from.
        rank: Who copies it.
        reads: Takes the digest of what was copied; None where nobody asks.
    """

    name: str
    tensor: StreamedTensor
    rank: int
    reads: ReadRecord | None = None

    @property
    def dtype(self) -> str:
        """As safetensors writes it."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.nbytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The source's bytes in pieces; each piece may be reused by the next.

        Raises:
            NumericsError: It holds NaN or Inf; names the tensor and the rank.
            SourceError: Its file ended early, cannot be read, or changed since it was read before.
        """
        dtype, digests = TORCH_DTYPES[self.dtype], []
        is_checked = dtype.is_floating_point and dtype.itemsize >= 2
        for chunk in self.tensor.chunks():
            if is_checked and not _all_finite(chunk, dtype):
                raise NumericsError(
                    f"{self.name} (rank {self.rank})",
                    value="NaN or Inf",
                    rule="every weight must be finite, copied ones too",
                    remedy="replace the source checkpoint; its weights are corrupt",
                )
            if self.reads is not None:
                digests.append(digest_piece(memoryview(chunk)))
            yield chunk
        if self.reads is not None:
            assert isinstance(self.tensor, TensorInfo), "only files are recorded"
            self.reads.add(self.tensor, None, digest_pieces(digests))


def take_copy(source: Source, name: str, rank: int) -> CheckedCopy:
    """A tensor to copy; its values are looked at when it is written.

    Raises:
        SourceError: It is not there.
    """
    return CheckedCopy(name, source.copy_of(name), rank, source.reads)


def _all_finite(chunk: bytes | memoryview, dtype: torch.dtype) -> bool:
    """By the extremes, which NaN takes over: 20 times faster than looking at each value."""
    if not len(chunk):
        return True
    lowest, highest = torch.aminmax(torch.frombuffer(chunk, dtype=dtype))
    return bool(lowest.isfinite() & highest.isfinite())
