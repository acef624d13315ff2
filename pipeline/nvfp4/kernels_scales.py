# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""How a kernel chooses the scales of the blocks it holds, by each method.

In: the magnitudes of B blocks (lanes), their amax, the amax and the scale of the tensor. Out: the
block scales of `reference`, with the E2M1 values and the fp32 errors that come of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.nvfp4 import formats
from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.kernels_blocks import (
    E4M3_MAX,
    RECIPROCAL_6,
    divide_and_round,
    per_lane,
    quotient,
    reciprocal_of,
    round_to_e4m3,
    squared_error,
)
from pipeline.nvfp4.kernels_sweep import sweep_scales

METHOD_CODES = {method: code for code, method in enumerate(WeightMethod)}
FOUR_OVER_SIX = tl.constexpr(METHOD_CODES[WeightMethod.four_over_six])
_MAX_DYNAMIC = tl.constexpr(METHOD_CODES[WeightMethod.max_dynamic])
_MSE = tl.constexpr(METHOD_CODES[WeightMethod.mse])
_FOUR_OVER_SIX_MAX = tl.constexpr(formats.FOUR_OVER_SIX_MAX)
_MULTIPLIER = tl.constexpr(formats.FOUR_OVER_SIX_MULTIPLIER)


@triton.jit
def choose_scales(
    magnitude,
    amax_B,
    amax,
    tensor_scale,
    METHOD: tl.constexpr,
    ORDINARY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Block scales [B], E2M1 values (lanes), fp32 errors [B] and whether on four won [B]."""
    is_m4_B = amax_B < 0
    if METHOD == _MSE:
        chosen_B, error_B = sweep_scales(magnitude, amax_B, tensor_scale, ORDINARY, BLOCKS)
        value = divide_and_round(magnitude, chosen_B * tensor_scale, ORDINARY, True)
    else:
        if METHOD == _MAX_DYNAMIC:
            chosen_B = _scale_of_dynamic(amax_B, tensor_scale, ORDINARY)
        elif METHOD == FOUR_OVER_SIX:
            chosen_B = scale_on_six(amax_B, 1.0, amax, _FOUR_OVER_SIX_MAX, ORDINARY)
        else:
            chosen_B = scale_on_six(amax_B, 1.0, amax, E4M3_MAX, ORDINARY)
        scale_B = chosen_B * tensor_scale
        value = divide_and_round(magnitude, scale_B, ORDINARY, True)
        error_B = squared_error(value, scale_B, magnitude, BLOCKS)
        if METHOD == FOUR_OVER_SIX:
            four_B = scale_on_six(amax_B, _MULTIPLIER, amax, _FOUR_OVER_SIX_MAX, ORDINARY)
            scale_B = four_B * tensor_scale
            on_four = divide_and_round(magnitude, scale_B, ORDINARY, True)
            error_on_four_B = squared_error(on_four, scale_B, magnitude, BLOCKS)
            # Strictly less, so the scales differ: such a block did land on another value.
            is_m4_B = error_on_four_B < error_B
            chosen_B = tl.where(is_m4_B, four_B, chosen_B)
            value = tl.where(per_lane(is_m4_B), on_four, value)
            error_B = tl.where(is_m4_B, error_on_four_B, error_B)
    if not ORDINARY:
        # A scale that underflowed to zero gives magnitude 0.
        value = tl.where(per_lane(chosen_B * tensor_scale > 0), value, 0.0)
    return chosen_B, value, error_B, is_m4_B


@triton.jit
def scale_on_six(
    amax_B, multiplier: tl.constexpr, amax, LARGEST: tl.constexpr, ORDINARY: tl.constexpr
):
    """`reference.scale_from_amax` of a stored tensor amax; fp32 holding E4M3, [B]."""
    scale_B = (amax_B * multiplier) * RECIPROCAL_6
    scale_B = tl.where(scale_B == 0, 1.0, scale_B) * LARGEST
    limit = amax * RECIPROCAL_6
    if ORDINARY:
        # What is far beyond 448 stays beyond it; without the limit it could become Inf - Inf.
        scale_B = tl.minimum(scale_B, limit * 1024.0)
    return round_to_e4m3(quotient(scale_B, limit, reciprocal_of(limit), ORDINARY))


@triton.jit
def _scale_of_dynamic(amax_B, tensor_scale, ORDINARY: tl.constexpr):
    """The scales of `max_dynamic`; fp32 holding E4M3, [B]."""
    limit = tensor_scale * 6.0
    if ORDINARY:
        scale_B = tl.minimum(amax_B, limit * 1024.0)
        scale_B = quotient(scale_B, limit, reciprocal_of(limit), True)
    else:
        scale_B = tl.math.div_rn(amax_B, limit)
    return round_to_e4m3(tl.where(scale_B == 0, 1.0, scale_B))
