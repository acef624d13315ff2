# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the Triton kernels share: a stack as flat matrices, and the exact arithmetic of a block.

In: weights [..., N, K], whose matrices lie in memory without gaps; then every block of 16 follows
the one before it and rows need no attention. Out: matrices [E, N * K], and jit functions on tiles
[B, 16] of B blocks that give the bits of `reference`.

Kernels must be launched with `enable_fp_fusion=False`: a product and a sum fused into one rounding
are other bits. Where a fused multiply-add is wanted it is written, `tl.fma`.

**Ordinary amax.** Where `ORDINARY`, the amax of the matrix is in [2**-30, 2**60] (`is_ordinary`):
no scale and no quotient of interest can then overflow or become subnormal, and two shortcuts below
are exact. Elsewhere kernels do the reference's operations one by one.

Dims: E matrices, B blocks (of a tile), L the 16 lanes of a block.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4 import formats

LAUNCH = {"enable_fp_fusion": False}
"""Options of every launch whose bytes matter."""

E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
E4M3_MIN = tl.constexpr(formats.E4M3_MIN)
RECIPROCAL_6 = tl.constexpr(formats.RECIPROCAL_6)
RECIPROCAL_448 = tl.constexpr(formats.RECIPROCAL_448)

_EXPONENT_MASK = tl.constexpr(0x7F800000)
# E4M3 has 3 bits below the leading one and is spaced evenly below 2**-6; E2M1 has 1, and 1.0.
_E4M3_NORMAL = tl.constexpr(2.0**-6)
_E4M3_SHIFT = tl.constexpr(1.5 * 2.0**20)
_E2M1_SHIFT = tl.constexpr(1.5 * 2.0**22)
# Moves the least normal value of a format onto that of fp32; the code is then fp32's top bits.
_E4M3_TO_CODE = tl.constexpr(2.0**-120)
_E4M3_FROM_CODE = tl.constexpr(2.0**120)
_E2M1_TO_CODE = tl.constexpr(2.0**-126)
# See _round_to_e2m1.
_TWO_22 = tl.constexpr(2.0**22)
_LEAST_LEADING = tl.constexpr(1.0 + 2.0**-21)
_ABOVE_SIX = tl.constexpr(6.5)
_ORDINARY_MIN = tl.constexpr(2.0**-30)
_ORDINARY_MAX = tl.constexpr(2.0**60)


def as_matrices(weight: Tensor) -> Tensor:
    """View [..., N, K] as [E, N * K]; matrices that do not lie in one piece are copied first."""
    *leading, n_rows, columns = weight.shape
    stack = weight.detach().reshape(math.prod(leading), n_rows, columns)
    matrices = stack.flatten(1) if stack[:1].is_contiguous() else stack.contiguous().flatten(1)
    # Kernels read 16 bytes at a time: a stack with odd gaps is closed up.
    return matrices if matrices.stride(0) % formats.BLOCK_SIZE == 0 else matrices.contiguous()


@triton.jit
def is_ordinary(amax):
    """Whether shortcuts are exact under this (stored) tensor amax; NaN is not ordinary."""
    return (amax >= _ORDINARY_MIN) & (amax <= _ORDINARY_MAX)


@triton.jit
def stored_amax(amax):
    """The amax that scales are made of: an all-zero tensor is stored as if it were 1.0."""
    return tl.where(amax == 0, 1.0, amax)


@triton.jit
def load_lanes(pointer, first, is_block_B, BLOCKS: tl.constexpr):
    """Load [B, 16] as fp32, a whole block per thread; masked blocks are zeros.

    A load gives a thread 16 bytes at most, half a block of bf16. Two loads of halves leave both
    halves in the same thread, so that nothing below needs another thread's lanes.
    """
    offset_BH = tl.arange(0, BLOCKS)[:, None] * 16 + tl.arange(0, 8)[None, :]
    low_BH = tl.load(pointer + first + offset_BH, mask=is_block_B[:, None], other=0.0)
    high_BH = tl.load(pointer + first + 8 + offset_BH, mask=is_block_B[:, None], other=0.0)
    lanes_BHL = tl.permute(tl.join(low_BH, high_BH), (0, 2, 1))
    return tl.reshape(lanes_BHL, (BLOCKS, 16)).to(tl.float32)


@triton.jit
def sum_block(values_BL, BLOCKS: tl.constexpr):
    """Add 16 lanes in adjacent pairs, as the reference does; [B]."""
    even, odd = tl.split(tl.reshape(values_BL, (BLOCKS, 8, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (BLOCKS, 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (BLOCKS, 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def quotient(numerator, denominator, reciprocal, ORDINARY: tl.constexpr):
    """The correctly rounded `numerator / denominator`, with `reciprocal = RN(1 / denominator)`.

    Markstein's sequence: q is off by at most 1.5 ulp, its remainder is exact in a fused
    multiply-add, and the corrected q is RN(Q + d) where Q is the exact quotient. What matters is
    on which side of a threshold t of E2M1 or E4M3 it ends, so let Q be near M, the midpoint
    between t and its neighbour. M has 25 bits, hence Q != M, and |Q - M| >= ulp(t) 2**-24 / m for
    a denominator of significand m < 2. There |Q - q| is half an ulp, and |reciprocal * denominator
    - 1| <= m 2**-25, so |d| <= ulp(t) m 2**-26, which is less as m**2 < 4: never another side.
    Elsewhere an ulp does not matter.
    """
    if ORDINARY:
        estimate = numerator * reciprocal
        remainder = tl.fma(-estimate, denominator, numerator)
        return tl.fma(remainder, reciprocal, estimate)
    else:
        return tl.math.div_rn(numerator, denominator)


@triton.jit
def round_to_e4m3(scale):
    """Clamp to [2**-9, 448] and round to nearest even E4M3; fp32. NaN is not expected."""
    return round_magnitude_to_e4m3(tl.minimum(tl.maximum(scale, E4M3_MIN), E4M3_MAX))


@triton.jit
def round_magnitude_to_e4m3(magnitude):
    """Round 0 .. 448 to nearest even E4M3; fp32.

    E4M3 keeps multiples of an eighth of the power of two. Adding 1.5 * 2**20 times that power
    rounds to just that, ties to even.
    """
    power = (magnitude.to(tl.int32, bitcast=True) & _EXPONENT_MASK).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, _E4M3_NORMAL) * _E4M3_SHIFT
    return (magnitude + shift) - shift


@triton.jit
def e4m3_code(value):
    """The byte, as int32, of a value >= 0 that E4M3 holds."""
    return (value * _E4M3_TO_CODE).to(tl.int32, bitcast=True) >> 20


@triton.jit
def e4m3_value(code):
    """The fp32 value of E4M3 bytes 0..126, given as int32."""
    return (code << 20).to(tl.float32, bitcast=True) * _E4M3_FROM_CODE


@triton.jit
def divide_and_round(magnitude_BL, scale_B, ORDINARY: tl.constexpr, EXACT: tl.constexpr):
    """E2M1 values [B, 16] of `magnitude / scale`, as `round_to_e2m1` has them.

    Args:
        magnitude_BL: fp32 >= 0.
        scale_B: fp32 >= 0.
        ORDINARY: The amax of the matrix is ordinary.
        EXACT: False lets a quotient within an ulp of a threshold end on either side: for errors
            that are only reported.
    """
    if ORDINARY:
        # 6.5 still rounds to 6; without the limit a huge quotient would become Inf - Inf.
        bounded_BL = tl.minimum(magnitude_BL, (scale_B * _ABOVE_SIX)[:, None])
        reciprocal_BL = tl.math.div_rn(1.0, scale_B)[:, None]
        if EXACT:
            ratio_BL = quotient(bounded_BL, scale_B[:, None], reciprocal_BL, True)
        else:
            ratio_BL = bounded_BL * reciprocal_BL
        return _round_to_e2m1(ratio_BL)
    else:
        ratio_BL = tl.math.div_rn(magnitude_BL, scale_B[:, None])
        # 0 / 0, where a scale underflowed, is NaN in the reference too and never wins.
        ratio_BL = tl.minimum(ratio_BL, 6.0, propagate_nan=tl.PropagateNan.ALL)
        power_BL = tl.maximum(ratio_BL.to(tl.int32, bitcast=True) & _EXPONENT_MASK, 0x3F800000)
        shift_BL = power_BL.to(tl.float32, bitcast=True) * _E2M1_SHIFT
        return (ratio_BL + shift_BL) - shift_BL


@triton.jit
def _round_to_e2m1(ratio):
    """Round 0 .. 6.5 to nearest even E2M1 in three operations, two of them multiply-adds.

    Let q be the ratio, e its exponent (0 below 1) and u = 2**(e-1) the spacing of E2M1 there. With
    p = max(q, 1 + 2**-21), the exact 2**22 p is an even multiple of u wherever q is a tie, and
    2**22 p - q lies in [2**(e+22), 2**(e+23)), where fp32 is spaced by u: rounding it rounds q to
    a multiple of u, ties to even. (Below 2**(e+22) only where q is 2**e or the next fp32 above it;
    the spacing u/2 there gives 2**e as well.) The second line recovers the rounded q exactly.
    """
    leading = tl.maximum(ratio, _LEAST_LEADING)
    rounded = tl.fma(leading, _TWO_22, -ratio)
    return tl.fma(leading, _TWO_22, -rounded)


@triton.jit
def squared_error(value_BL, scale_B, magnitude_BL, BLOCKS: tl.constexpr):
    """The reference's fp32 error of a candidate, [B], bit for bit."""
    error_BL = value_BL * scale_B[:, None] - magnitude_BL
    return sum_block(error_BL * error_BL, BLOCKS)


@triton.jit
def pack_bytes(value_BL, lanes_BL, BLOCKS: tl.constexpr):
    """Packed codes uint8 [B, 8] of E2M1 values with the signs of the weights.

    The sign bit is `weight < 0`: adding +0.0 turns -0.0 into +0.0, which has no sign bit.
    """
    magnitude_BL = (value_BL * _E2M1_TO_CODE).to(tl.int32, bitcast=True) >> 22
    sign_BL = ((lanes_BL + 0.0).to(tl.int32, bitcast=True) >> 28) & 8
    low_BH, high_BH = tl.split(tl.reshape(magnitude_BL | sign_BL, (BLOCKS, 8, 2)))
    return (low_BH | (high_BH << 4)).to(tl.uint8)
