"""How the reference walks over large weights: flattened to rows, in chunks, block by block.

In: weights [..., N, K] and values [...] of their matrices. Out: rows [R, K], values per row, and
the blocks of a few rows side by side. None of it changes a result; it bounds memory and time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.errors import NumericsError
from pipeline.nvfp4.formats import BLOCK_SIZE

CPU_CHUNK_ELEMENTS = 2**17
"""512 KiB of fp32: the temporaries of a chunk stay in a core's cache."""

DEVICE_CHUNK_ELEMENTS = 2**25
"""128 MiB of fp32 per temporary; large enough that launches cost nothing."""


def check_dtype(weight: Tensor, name: str = "weight") -> None:
    """Raise NumericsError unless the weight is bf16 or fp32."""
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise NumericsError(
            name,
            value=str(weight.dtype).removeprefix("torch."),
            rule="weights must be bfloat16, or float32 holding bfloat16 values",
            remedy="cast the weight to bfloat16 first",
        )


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise NumericsError unless the weight is bf16 or fp32 [..., N, K] with K in blocks of 16."""
    check_dtype(weight, name)
    if weight.ndim < 2 or weight.shape[-1] % BLOCK_SIZE:
        raise NumericsError(
            name,
            value=f"shape {list(weight.shape)}",
            rule=f"NVFP4 needs [..., N, K] with K a multiple of {BLOCK_SIZE}",
            remedy="keep this weight in BF16 or FP8, or cut it along K into fewer shards",
        )


def check_per_matrix(weight: Tensor, values: Tensor) -> None:
    """Raise NumericsError unless `values` [...] has one value for each matrix of [..., N, K]."""
    if values.shape != weight.shape[:-2]:
        raise NumericsError(
            "tensor_amax or weight_scale_2",
            value=f"shape {list(values.shape)}",
            rule=f"weights {list(weight.shape)} need one value per matrix",
            remedy=f"pass a tensor of shape {list(weight.shape[:-2])}",
        )


def as_rows(weight: Tensor, *per_matrix: Tensor) -> tuple[Tensor, ...]:
    """Flatten [..., N, K] to [R, K], and repeat each [...] tensor over the rows of its matrix."""
    n_rows = weight.shape[-2]
    for values in per_matrix:
        check_per_matrix(weight, values)
    rows_RK = weight.detach().flatten(0, -2)
    return rows_RK, *(values.flatten().repeat_interleave(n_rows) for values in per_matrix)


def row_chunks(rows_RK: Tensor) -> Iterator[slice]:
    """Cut the rows into chunks of at most so many elements (at least one row each)."""
    on_cpu = rows_RK.device.type == "cpu"
    elements = CPU_CHUNK_ELEMENTS if on_cpu else DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // max(1, rows_RK.shape[1]))
    for start in range(0, len(rows_RK), step):
        yield slice(start, start + step)


def to_lanes(rows_RK: Tensor) -> Tensor:
    """Return fp32 [16, B]: the first weight of every block, then every second one, and so on.

    In this layout one value per block meets contiguous memory in every elementwise operation.
    """
    return rows_RK.reshape(-1, BLOCK_SIZE).t().float().contiguous()
