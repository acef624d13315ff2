"""Tensors that keep the source's bytes: looked at once, then copied from their file.

In: the source and a tensor's name. Out: its place in the source, for the writer to copy. NaN and
Inf are refused here too: no quantizer and no forward pass would meet them.
"""

from __future__ import annotations

import torch

from pipeline.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo, iterate_chunks
from pipeline.checkpoint.source import Source
from pipeline.errors import NumericsError


def take_copy(source: Source, name: str, rank: int) -> TensorInfo:
    """The place of a tensor whose values are all finite.

    Raises:
        NumericsError: It holds NaN or Inf; names the tensor and the rank.
        SourceError: It is not there, or its file ended early.
    """
    info = source.info(name)
    dtype = TORCH_DTYPES[info.dtype]
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return info
    for chunk in iterate_chunks(info):
        if not bool(torch.isfinite(torch.frombuffer(chunk, dtype=dtype)).all()):
            raise NumericsError(
                f"{name} (rank {rank})",
                value="NaN or Inf",
                rule="every weight must be finite, copied ones too",
                remedy="replace the source checkpoint; its weights are corrupt",
            )
    return info
