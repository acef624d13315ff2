# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the Triton kernels share: a stack as flat matrices, and the exact arithmetic of a block.

In: weights [..., N, K], whose matrices lie in memory without gaps; then every block of 16 follows
the one before it and rows need no attention. Out: matrices [E, N * K], and jit functions on tiles
of B blocks that give the bits of `reference`.

**Lanes.** The 16 weights of B blocks are a tensor [B, 4, 2, 2]: quarter (Q), half (H) and parity of
the lane 8 H + 2 Q + parity. So split, one thread holds whole blocks, bf16 arrive in pairs, 16 bytes
at a time, and the reference's sum in adjacent pairs takes no exchange between threads.

Kernels must be launched with `enable_fp_fusion=False`: a product and a sum fused into one rounding
are other bits. Where a fused multiply-add is wanted it is written, `tl.fma`.

**Ordinary amax.** Where `ORDINARY`, the amax of the matrix is in [2**-30, 2**60] (`is_ordinary`):
no scale and no quotient of interest can then overflow or become subnormal, and two shortcuts below
are exact. Elsewhere kernels do the reference's operations one by one.

Dims: E matrices, B blocks of a tile; P pairs, Q quarters and H halves within a block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4 import formats

LAUNCH = {"enable_fp_fusion": False}
"""Options of every launch whose bytes matter."""

E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
E4M3_MIN = tl.constexpr(formats.E4M3_MIN)
RECIPROCAL_6 = tl.constexpr(formats.RECIPROCAL_6)

# Of round_ratio: just above the least normal value, and 2**23 over values per power of two.
E4M3_LEADING = tl.constexpr(2.0**-6 * (1.0 + 2.0**-19))
E4M3_FACTOR = tl.constexpr(2.0**20)
_E2M1_LEADING = tl.constexpr(1.0 + 2.0**-21)
_E2M1_FACTOR = tl.constexpr(2.0**22)
# Moves the least normal value of a format onto that of fp32; the code is then fp32's top bits.
_E4M3_TO_CODE = tl.constexpr(2.0**-120)
_E4M3_FROM_CODE = tl.constexpr(2.0**120)
_E2M1_TO_CODE = tl.constexpr(2.0**-126)
# Of the rounding that the reference does, where an amax is not ordinary.
_EXPONENT_MASK = tl.constexpr(0x7F800000)
_E2M1_SHIFT = tl.constexpr(1.5 * 2.0**22)
_ABOVE_SIX = tl.constexpr(6.5)
_ORDINARY_MIN = tl.constexpr(2.0**-30)
_ORDINARY_MAX = tl.constexpr(2.0**60)


def as_matrices(weight: Tensor) -> Tensor:
    """View [..., N, K] as [E, N * K]; matrices that do not lie in one piece are copied first.

    So is a stack that starts at an odd place: kernels read 16 bytes at a time.
    """
    *leading, n_rows, columns = weight.shape
    stack = weight.detach().reshape(math.prod(leading), n_rows, columns)
    matrices = stack.flatten(1) if stack[:1].is_contiguous() else stack.contiguous().flatten(1)
    if matrices.data_ptr() % 16:
        return matrices.clone(memory_format=torch.contiguous_format)
    # Gaps between matrices may be any number of blocks; contiguous ones may be of any size.
    return matrices if matrices.stride(0) % formats.BLOCK_SIZE == 0 else matrices.contiguous()


def as_words(matrices: Tensor) -> Tensor:
    """View bf16 matrices as int32, two weights each, which are cheaper to unpack; fp32 as such."""
    return matrices.view(torch.int32) if matrices.dtype is torch.bfloat16 else matrices


@triton.jit
def is_ordinary(amax):
    """Whether shortcuts are exact under this (stored) tensor amax; NaN is not ordinary."""
    return (amax >= _ORDINARY_MIN) & (amax <= _ORDINARY_MAX)


@triton.jit
def stored_amax(amax):
    """The amax that scales are made of: an all-zero tensor is stored as if it were 1.0."""
    return tl.where(amax == 0, 1.0, amax)


@triton.jit
def load_words(pointer, first, is_block_B, BLOCKS: tl.constexpr):
    """Load BLOCKS blocks from block `first` on, for `lanes_of`; masked blocks are zeros.

    `pointer` is to int32, the bits of two bf16, or to fp32.
    """
    block_BQ = (first + tl.arange(0, BLOCKS).to(tl.int64))[:, None]
    quarter_BQ = tl.arange(0, 4)[None, :]
    mask_BQ = is_block_B[:, None]
    if pointer.dtype.element_ty == tl.int32:
        word_BQ = pointer + block_BQ * 8 + quarter_BQ
        low_BQ = tl.load(word_BQ, mask=mask_BQ, other=0)
        high_BQ = tl.load(word_BQ + 4, mask=mask_BQ, other=0)
        return tl.join(low_BQ, high_BQ)
    else:
        lane_BQ = pointer + block_BQ * 16 + quarter_BQ * 2
        even_low_BQ = tl.load(lane_BQ, mask=mask_BQ, other=0.0)
        odd_low_BQ = tl.load(lane_BQ + 1, mask=mask_BQ, other=0.0)
        even_high_BQ = tl.load(lane_BQ + 8, mask=mask_BQ, other=0.0)
        odd_high_BQ = tl.load(lane_BQ + 9, mask=mask_BQ, other=0.0)
        even_BQH = tl.join(even_low_BQ, even_high_BQ)
        return tl.join(even_BQH, tl.join(odd_low_BQ, odd_high_BQ))


@triton.jit
def lanes_of(words):
    """The fp32 lanes of what `load_words` loaded."""
    if words.dtype == tl.int32:
        even_BQH = (words << 16).to(tl.float32, bitcast=True)
        odd_BQH = (words & -65536).to(tl.float32, bitcast=True)
        return tl.join(even_BQH, odd_BQH)
    else:
        return words


@triton.jit
def per_lane(values_B):
    """Make [B] fit the lanes of blocks."""
    return values_B[:, None, None, None]


@triton.jit
def max_block(lanes, BLOCKS: tl.constexpr):
    """The largest lane of each block, [B]."""
    even_BQH, odd_BQH = tl.split(lanes)
    low_BQ, high_BQ = tl.split(tl.maximum(even_BQH, odd_BQH))
    even_BP, odd_BP = tl.split(tl.reshape(tl.maximum(low_BQ, high_BQ), (BLOCKS, 2, 2)))
    even_B, odd_B = tl.split(tl.maximum(even_BP, odd_BP))
    return tl.maximum(even_B, odd_B)


@triton.jit
def sum_block(lanes, BLOCKS: tl.constexpr):
    """The sum of the lanes of each block, added in adjacent pairs as the reference does; [B]."""
    even_BQH, odd_BQH = tl.split(lanes)
    low_BQ, high_BQ = tl.split(even_BQH + odd_BQH)
    return _sum_quarters(low_BQ, BLOCKS) + _sum_quarters(high_BQ, BLOCKS)


@triton.jit
def sum_squares(lanes, BLOCKS: tl.constexpr):
    """The sum of the squares of each block, [B], in an order of its own: for figures only."""
    even_BQH, odd_BQH = tl.split(lanes)
    square_BQH = tl.fma(odd_BQH, odd_BQH, even_BQH * even_BQH)
    low_BQ, high_BQ = tl.split(square_BQH)
    return _sum_quarters(low_BQ + high_BQ, BLOCKS)


@triton.jit
def _sum_quarters(values_BQ, BLOCKS: tl.constexpr):
    even_BP, odd_BP = tl.split(tl.reshape(values_BQ, (BLOCKS, 2, 2)))
    even_B, odd_B = tl.split(even_BP + odd_BP)
    return even_B + odd_B


@triton.jit
def reciprocal_of(denominator):
    """`1 / denominator` for `quotient`, from an approximate one and two Newton steps.

    The error of an approximation is squared by each step: what is rounded at the end is off by at
    most 2**-48 of itself. It is the correctly rounded reciprocal, except that it may be the other
    neighbour where 1 / denominator lies that close to their midpoint.
    """
    approximate = 1.0 / denominator
    approximate = tl.fma(tl.fma(approximate, -denominator, 1.0), approximate, approximate)
    return tl.fma(tl.fma(approximate, -denominator, 1.0), approximate, approximate)


@triton.jit
def quotient(numerator, denominator, reciprocal, ORDINARY: tl.constexpr):
    """The rounded `numerator / denominator`, as far as E2M1 and E4M3 can tell.

    Markstein's sequence with `reciprocal_of(denominator)`: the estimate q is off by at most 1.5
    ulp, its remainder is exact in a fused multiply-add, and the corrected q is RN(Q + d) where Q is
    the exact quotient. What matters is on which side of a threshold t of a format it ends, so let Q
    be near M, the midpoint between t and its neighbour. M has 25 bits, hence Q != M, and |Q - M| >=
    ulp(t) 2**-24 / m for a denominator of significand m < 2. There |Q - q| is half an ulp, and
    |reciprocal * denominator - 1| <= m 2**-25 (1 + x), so |d| <= ulp(t) m (1 + x) 2**-26, which is
    less if m**2 (1 + x) < 4: never another side. x is 0 for the correctly rounded reciprocal and
    below 2**-23 for the other neighbour. That suffices up to m = 2 - 2 * 2**-23; for m = 2 - 2**-23
    the reciprocal is 2**-25 ulp from a midpoint, so x = 2**-24, and m**2 (1 + x) = 4 - 2**-22.
    Elsewhere an ulp does not matter.
    """
    if ORDINARY:
        estimate = numerator * reciprocal
        remainder = tl.fma(estimate, -denominator, numerator)
        return tl.fma(remainder, reciprocal, estimate)
    else:
        return tl.math.div_rn(numerator, denominator)


@triton.jit
def round_ratio(ratio, LEAST_LEADING: tl.constexpr, FACTOR: tl.constexpr):
    """Round 0 .. 6.5 to nearest even E2M1, or 0 .. 463 to E4M3, in three operations.

    Let q be the ratio and e its exponent, or that of the least normal value if that is more. The
    format is spaced by u = FACTOR 2**(e-23) around q: FACTOR is 2**22 for E2M1, 2**20 for E4M3.
    With p = max(q, LEAST_LEADING), FACTOR p is an even multiple of u wherever q is a tie (q has few
    bits there), and FACTOR p - q lies in [FACTOR 2**e, FACTOR 2**(e+1)), where fp32 is spaced by u:
    rounding it rounds q to a multiple of u, ties to even. (Only where q is 2**e or barely above it
    does it fall below; the spacing u / 2 there gives 2**e as well.) LEAST_LEADING is a little above
    the least normal value, so that this holds for all smaller q. The last line recovers the
    rounded q without another rounding.
    """
    leading = tl.maximum(ratio, LEAST_LEADING)
    rounded = tl.fma(leading, -FACTOR, ratio)
    return tl.fma(leading, FACTOR, rounded)


@triton.jit
def round_to_e4m3(scale):
    """Clamp to [2**-9, 448] and round to nearest even E4M3; fp32. NaN is not expected."""
    bounded = tl.minimum(tl.maximum(scale, E4M3_MIN), E4M3_MAX)
    return round_ratio(bounded, E4M3_LEADING, E4M3_FACTOR)


@triton.jit
def e4m3_code(value):
    """The byte, as int32, of a value >= 0 that E4M3 holds."""
    return (value * _E4M3_TO_CODE).to(tl.int32, bitcast=True) >> 20


@triton.jit
def e4m3_value(code):
    """The fp32 value of E4M3 bytes 0..126, given as int32."""
    return (code << 20).to(tl.float32, bitcast=True) * _E4M3_FROM_CODE


@triton.jit
def divide_and_round(magnitude, scale_B, ORDINARY: tl.constexpr, EXACT: tl.constexpr):
    """E2M1 values of `magnitude / scale`, as the reference's `round_to_e2m1` has them.

    Args:
        magnitude: Lanes, fp32 >= 0.
        scale_B: fp32 >= 0.
        ORDINARY: The amax of the matrix is ordinary.
        EXACT: False lets a quotient within two ulp of a threshold end on either side: for errors
            that are only reported.
    """
    if ORDINARY:
        # 6.5 still rounds to 6; without the limit a huge quotient would become Inf - Inf.
        bounded = tl.minimum(magnitude, per_lane(scale_B * _ABOVE_SIX))
        reciprocal = per_lane(reciprocal_of(scale_B))
        if EXACT:
            ratio = quotient(bounded, per_lane(scale_B), reciprocal, True)
        else:
            ratio = bounded * reciprocal
        return round_ratio(ratio, _E2M1_LEADING, _E2M1_FACTOR)
    else:
        ratio = tl.math.div_rn(magnitude, per_lane(scale_B))
        # 0 / 0, where a scale underflowed, is NaN in the reference too and never wins.
        ratio = tl.minimum(ratio, 6.0, propagate_nan=tl.PropagateNan.ALL)
        power = tl.maximum(ratio.to(tl.int32, bitcast=True) & _EXPONENT_MASK, 0x3F800000)
        shift = power.to(tl.float32, bitcast=True) * _E2M1_SHIFT
        return (ratio + shift) - shift


@triton.jit
def squared_error(value, scale_B, magnitude, BLOCKS: tl.constexpr):
    """The reference's fp32 error of a candidate, [B], bit for bit."""
    error = value * per_lane(scale_B) - magnitude
    return sum_block(error * error, BLOCKS)


@triton.jit
def pack_codes(value, lanes, BLOCKS: tl.constexpr):
    """Packed codes of each block, int64 [B], of E2M1 values with the signs of the weights.

    The sign bit is `weight < 0`: adding +0.0 turns -0.0 into +0.0, which has no sign bit. Codes
    arise in bits 22..25 and stay there until two of them are a byte.
    """
    magnitude = (value * _E2M1_TO_CODE).to(tl.int32, bitcast=True)
    sign = ((lanes + 0.0).to(tl.int32, bitcast=True) >> 6) & (1 << 25)
    even_BQH, odd_BQH = tl.split(magnitude | sign)
    low_BQ, high_BQ = tl.split(even_BQH + (odd_BQH << 4))
    low_B, high_B = _pack_quarters(low_BQ, BLOCKS), _pack_quarters(high_BQ, BLOCKS)
    return (low_B.to(tl.int64) & 0xFFFFFFFF) | (high_B.to(tl.int64) << 32)


@triton.jit
def _pack_quarters(byte_BQ, BLOCKS: tl.constexpr):
    even_BP, odd_BP = tl.split(tl.reshape(byte_BQ, (BLOCKS, 2, 2)))
    even_B, odd_B = tl.split((even_BP >> 22) | (odd_BP >> 14))
    return even_B | (odd_B << 16)
