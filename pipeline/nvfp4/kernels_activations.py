# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Inputs quantized to NVFP4 or FP8 and back, or counted, on a GPU: one pass over memory each.

In: contiguous activations, for NVFP4 a list of blocks of 16, and their scale or bound. Out: the
values that the quantized ones stand for, with the bits of `activations` in plain torch; counts.
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
_ELEMENTS = 4096  # per program, or per tile where it counts
_TILES = 16
_WARPS = 4
# Of the rounding to E2M1 (see `codes.round_to_e2m1`).
_EXPONENT_MASK = tl.constexpr(0x7F800000)
_BITS_OF_ONE = tl.constexpr(0x3F800000)
_ROUND_TO_HALF = tl.constexpr(1.5 * 2.0**22)
_SIGN_MASK = tl.constexpr(-(2**31))


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


def quantize_fp8(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write to `out` what `x` becomes; both contiguous, of one shape, `scale` fp32 []."""
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert scale.dtype is torch.float32
    if x.numel():
        _fp8_kernel[(triton.cdiv(x.numel(), _ELEMENTS),)](
            x, scale, out, x.numel(), ELEMENTS=_ELEMENTS, num_warps=_WARPS, **LAUNCH
        )


def count_beyond(x: Tensor, amax: Tensor) -> Tensor:
    """Count the elements of contiguous `x` with `abs(x) > amax` (fp32 []): int64 []."""
    assert x.is_contiguous()
    assert amax.dtype is torch.float32
    programs = triton.cdiv(x.numel(), _ELEMENTS * _TILES)
    counts = torch.empty(programs, dtype=torch.int32, device=x.device)
    if programs:
        _count_kernel[(programs,)](
            x, amax, counts, x.numel(), ELEMENTS=_ELEMENTS, TILES=_TILES, num_warps=_WARPS
        )
    return counts.sum(dtype=torch.int64)


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


@triton.jit(do_not_specialize=["scale_ptr"])
def _fp8_kernel(x_ptr, scale_ptr, out_ptr, size: tl.int64, ELEMENTS: tl.constexpr):
    """Grid: ELEMENTS elements (X) each."""
    element_X = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    is_input_X = element_X < size
    x_X = tl.load(x_ptr + element_X, mask=is_input_X, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr)
    ratio_X = tl.minimum(tl.math.div_rn(tl.abs(x_X), scale), E4M3_MAX)
    value_X = round_ratio(ratio_X, E4M3_LEADING, E4M3_FACTOR) * scale
    # A zero keeps its sign, as in E4M3.
    sign_X = x_X.to(tl.int32, bitcast=True) & _SIGN_MASK
    value_X = (value_X.to(tl.int32, bitcast=True) | sign_X).to(tl.float32, bitcast=True)
    value_X = tl.where(x_X == x_X, value_X, x_X)  # a NaN must not become a number
    tl.store(out_ptr + element_X, value_X.to(out_ptr.dtype.element_ty), mask=is_input_X)


@triton.jit(do_not_specialize=["amax_ptr"])
def _count_kernel(
    x_ptr, amax_ptr, counts_ptr, size: tl.int64, ELEMENTS: tl.constexpr, TILES: tl.constexpr
):
    """Grid: TILES tiles of ELEMENTS elements (X) each; one count per program."""
    first = tl.program_id(0).to(tl.int64) * (ELEMENTS * TILES)
    amax = tl.load(amax_ptr)
    count_X = tl.zeros((ELEMENTS,), tl.int32)
    for tile in tl.static_range(TILES):
        element_X = first + tile * ELEMENTS + tl.arange(0, ELEMENTS)
        is_input_X = element_X < size
        x_X = tl.load(x_ptr + element_X, mask=is_input_X, other=0.0).to(tl.float32)
        count_X += (is_input_X & (tl.abs(x_X) > amax)).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count_X, axis=0))
