# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The sweep over all 126 E4M3 block scales, trying only those that could win.

In: the magnitudes of B blocks (lanes) and the scale of their tensor. Out: the scale that the
reference's loop over all candidates ends with: least fp32 error, the lowest value on a tie.

Let s be the fp32 scale of a candidate, a the block's amax, and `bound` the error of any one
candidate (on six), computed exactly. A candidate is left out only where its fp32 error is proven
to be above the bound, or equal to that of a lower candidate:

* **Below.** The term of the largest weight alone is (a - 6 s)**2, if a > 6 s.
* **Above.** A weight w <= s / 2 goes to 0 or s / 2, with the term min(w, s/2 - w)**2. This grows
  with s, for every larger scale too, so that the sum of such terms at s bounds the errors of all
  candidates from s on.
* **All zeros.** From s > 4 a on, every weight rounds to zero and all candidates err the same, to
  the bit; the lowest of them stands for all.

Errors are sums of terms >= 0 and fp32 rounding is monotone, so a sum is never below any of its
parts. The bounds themselves are computed in a few roundings: `_MARGIN` (2**-12) is a thousand
times what those can amount to, and `_SLACK` covers squares that underflow. Searching with bounds
that are too wide costs time, never a byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.nvfp4.kernels_blocks import (
    RECIPROCAL_6,
    divide_and_round,
    e4m3_code,
    e4m3_value,
    per_lane,
    round_to_e4m3,
    squared_error,
    sum_squares,
)

_CANDIDATES = tl.constexpr(126)
_MARGIN = tl.constexpr(1.0 + 2.0**-12)
_LESS = tl.constexpr(1.0 - 2.0**-12)  # below 1 / _MARGIN
_SLACK = tl.constexpr(2.0**-120)
_STEPS = tl.constexpr(5)
_REACH = tl.constexpr(31)  # the sum of the steps 16, 8, 4, 2 and 1


@triton.jit
def sweep_scales(magnitude, amax_B, tensor_scale, ORDINARY: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the block scales (fp32 holding E4M3, [B]) and their errors, fp32 [B]."""
    best_error_B = tl.full((BLOCKS,), float("inf"), tl.float32)
    best_code_B = tl.full((BLOCKS,), 1, tl.int32)
    if ORDINARY:
        first_B, last_B = _candidate_range(magnitude, amax_B, tensor_scale, BLOCKS)
        n_candidates = tl.max(last_B - first_B, axis=0) + 1
    else:
        first_B = best_code_B
        n_candidates = _CANDIDATES
    for step in range(n_candidates):
        code_B = tl.minimum(first_B + step, _CANDIDATES)
        scale_B = e4m3_value(code_B) * tensor_scale
        value = divide_and_round(magnitude, scale_B, ORDINARY, True)
        error_B = squared_error(value, scale_B, magnitude, BLOCKS)
        wins_B = error_B < best_error_B
        best_error_B = tl.where(wins_B, error_B, best_error_B)
        best_code_B = tl.where(wins_B, code_B, best_code_B)
    return e4m3_value(best_code_B), best_error_B


@triton.jit
def _candidate_range(magnitude, amax_B, tensor_scale, BLOCKS: tl.constexpr):
    """The lowest and the highest byte that each block must try, int32 [B]."""
    per_scale = 1.0 / tensor_scale
    on_six_B = round_to_e4m3(amax_B * per_scale * RECIPROCAL_6)
    scale_B = on_six_B * tensor_scale
    value = divide_and_round(magnitude, scale_B, True, True)
    error_B = squared_error(value, scale_B, magnitude, BLOCKS)
    bound_B = error_B * _MARGIN + _SLACK
    # Rounding down to E4M3 is cutting bits off.
    least_B = (amax_B - tl.sqrt(bound_B) * _MARGIN) * per_scale * RECIPROCAL_6 * _LESS
    first_B = tl.maximum(e4m3_code(tl.minimum(tl.maximum(least_B, 0.0), 448.0)), 1)
    on_six_code_B = e4m3_code(on_six_B)
    reach_B = tl.full((BLOCKS,), 0, tl.int32)
    for halving in tl.static_range(_STEPS):
        probe_B = reach_B + (16 >> halving)
        probed_B = e4m3_value(tl.minimum(on_six_code_B + probe_B, _CANDIDATES)) * tensor_scale
        is_open_B = _least_error_from(magnitude, probed_B, BLOCKS) <= bound_B
        reach_B = tl.where(is_open_B, probe_B, reach_B)
    last_B = tl.where(reach_B == _REACH, _CANDIDATES, on_six_code_B + reach_B)
    zeros_B = e4m3_code(tl.minimum(amax_B * per_scale * 4.0 * _MARGIN, 448.0)) + 1
    last_B = tl.minimum(tl.minimum(last_B, zeros_B), _CANDIDATES)
    return first_B, tl.maximum(last_B, first_B)


@triton.jit
def _least_error_from(magnitude, scale_B, BLOCKS: tl.constexpr):
    """What every candidate from this scale on errs at least, but for rounding; fp32 [B]."""
    distance = tl.minimum(magnitude, per_lane(scale_B * 0.5) - magnitude)
    return sum_squares(tl.maximum(distance, 0.0), BLOCKS)
