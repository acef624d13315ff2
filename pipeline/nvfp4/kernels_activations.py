# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Inputs quantized to NVFP4 and back on a GPU, in one pass over memory.

In: contiguous activations, a list of blocks of 16, and their scale. Out: the values that the
quantized ones stand for, with the bits of `activations.nvfp4_input` in plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4.formats import BLOCK_SIZE
from pipeline.nvfp4.kernels_blocks import (
    E4M3_FACTOR,
    E4M3_LEADING,
    E4M3_MAX,
    LAUNCH,
    round_ratio,
)

_BLOCKS = 256  # per program
_WARPS = 4
# Of the rounding to E2M1 (see `codes.round_to_e2m1`).
_EXPONENT_MASK = tl.constexpr(0x7F800000)
_BITS_OF_ONE = tl.constexpr(0x3F800000)
_ROUND_TO_HALF = tl.constexpr(1.5 * 2.0**22)


def quantize_blocks(x: Tensor, input_scale: Tensor, out: Tensor) -> None:
    """Write to `out` what `x` becomes; both contiguous [..., K], `input_scale` fp32 []."""
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert input_scale.dtype is torch.float32
    blocks = x.numel() // BLOCK_SIZE
    if blocks:
        _quantize_kernel[(triton.cdiv(blocks, _BLOCKS),)](
            x, input_scale, out, blocks, BLOCKS=_BLOCKS, num_warps=_WARPS, **LAUNCH
        )


@triton.jit(do_not_specialize=["blocks"])
def _quantize_kernel(x_ptr, scale_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    """Grid: BLOCKS blocks each. Dims: B blocks, L the 16 lanes of each."""
    block_B = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element_BL = block_B[:, None] * 16 + tl.arange(0, 16)[None, :]
    is_input_BL = (block_B < blocks)[:, None]
    x_BL = tl.load(x_ptr + element_BL, mask=is_input_BL, other=0.0).to(tl.float32)
    input_scale = tl.load(scale_ptr)
    magnitude_BL = tl.abs(x_BL)
    ratio_B = tl.math.div_rn(tl.max(magnitude_BL, axis=1), input_scale * 6.0)
    scale_B = round_ratio(tl.minimum(ratio_B, E4M3_MAX), E4M3_LEADING, E4M3_FACTOR) * input_scale
    scale_BL = scale_B[:, None]
    # Where a scale is zero any quotient will do: its block becomes zeros.
    value_BL = tl.math.div_rn(magnitude_BL, tl.where(scale_BL > 0.0, scale_BL, 1.0))
    value_BL = tl.minimum(value_BL, 6.0)
    power_BL = tl.maximum(value_BL.to(tl.int32, bitcast=True) & _EXPONENT_MASK, _BITS_OF_ONE)
    shift_BL = power_BL.to(tl.float32, bitcast=True) * _ROUND_TO_HALF
    value_BL = ((value_BL + shift_BL) - shift_BL) * scale_BL
    value_BL = tl.where(x_BL < 0.0, 0.0 - value_BL, value_BL)
    value_BL = tl.where(x_BL == x_BL, value_BL, x_BL)  # a NaN must not become a number
    tl.store(out_ptr + element_BL, value_BL.to(out_ptr.dtype.element_ty), mask=is_input_BL)
