# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Sums of squares of activations, or of their differences, on a GPU: one pass over memory.

In: activations [seq, batch, K], bf16 or fp32, and others to subtract. Out: a sum for each batch
entry, within 1e-6 of one in fp64 of the fp32 squares: they are added in fp32 over 8 neighbours and
in fp64 from there on, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4.kernels_blocks import LAUNCH

_EIGHTS = 256  # per tile; eight bf16 are the 16 bytes that a thread reads at once
_WARPS = 4


def sum_squares(values: Tensor, subtracted: Tensor | None = None) -> Tensor:
    """Sum the squares of [seq, batch, K], less `subtracted` of the same shape: fp64 [batch]."""
    x = values.detach().contiguous()
    other = x if subtracted is None else subtracted.detach().contiguous()
    assert other.shape == x.shape
    length, batch, columns = x.shape
    sums = torch.zeros(length, batch, dtype=torch.float64, device=x.device)
    if x.numel():
        _squares_kernel[(length * batch,)](
            x,
            other,
            sums,
            columns,
            SUBTRACTS=subtracted is not None,
            EIGHTS=_EIGHTS,
            num_warps=_WARPS,
            **LAUNCH,
        )
    return sums.sum(0)


@triton.jit
def _squares_kernel(
    x_ptr, other_ptr, sums_ptr, columns, SUBTRACTS: tl.constexpr, EIGHTS: tl.constexpr
):
    """Grid: one row of `columns` elements each. Dims: X eights of a row, L the 8 of each."""
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * columns
    other_ptr += row.to(tl.int64) * columns
    sum_X = tl.zeros((EIGHTS,), tl.float64)
    for first in range(0, columns, EIGHTS * 8):
        element_XL = first + tl.arange(0, EIGHTS)[:, None] * 8 + tl.arange(0, 8)[None, :]
        is_value_XL = element_XL < columns
        value_XL = tl.load(x_ptr + element_XL, mask=is_value_XL, other=0.0).to(tl.float32)
        if SUBTRACTS:
            other_XL = tl.load(other_ptr + element_XL, mask=is_value_XL, other=0.0)
            value_XL -= other_XL.to(tl.float32)
        sum_X += tl.sum(value_XL * value_XL, axis=1).to(tl.float64)
    tl.store(sums_ptr + row, tl.sum(sum_X, axis=0))
