"""Formats and constants of NVFP4 and FP8: names, ranges and the fp32 reciprocals.

Nothing goes in; enums and numbers come out. NVFP4 stores a weight as 4-bit E2M1 codes with one
E4M3 scale per block of 16 along the input dim (`weight_scale`) and one fp32 scale per tensor
(`weight_scale_2`). FP8 stores E4M3 bytes with one fp32 scale per tensor.

**Dividing by a constant is multiplying by its fp32 reciprocal.** CUDA's `tensor / constant` does
that, and the last bit of a scale depends on it; the reciprocals below are exact in fp32.
"""

from enum import StrEnum
from typing import Final


class Format(StrEnum):
    """How a weight, an input or the KV cache is stored."""

    bf16 = "bf16"
    nvfp4 = "nvfp4"
    fp8 = "fp8"


class WeightMethod(StrEnum):
    """How the block scales of an NVFP4 weight are chosen.

    `max` lands every block maximum on 6. `max_dynamic` is the same with another order of
    divisions, that of Model Optimizer's quantizers with `type: dynamic`. `four_over_six` lands it
    on 6 or on 4, whichever errs less. `mse` tries all 126 positive E4M3 values.
    """

    max = "max"
    max_dynamic = "max_dynamic"
    four_over_six = "four_over_six"
    mse = "mse"


BLOCK_SIZE: Final = 16
"""Weights per block along K (NVFP4's definition)."""

E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of codes 0..7; code + 8 is the negative one."""

E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
E4M3_MIN: Final = 2.0**-9
"""Least positive E4M3 value (subnormal): no block scale is ever below it."""

FOUR_OVER_SIX_MAX: Final = 256.0
"""What four-over-six normalises block scales to: 1.5 x 256 = 384 still fits, 1.5 x 448 does not."""

FOUR_OVER_SIX_MULTIPLIER: Final = 1.5
"""6 / 4: the amax multiplier that lands the block maximum on 4 instead of 6."""

HOPPER_FLUSH_BELOW: Final = 2.0**-6
"""Least normal E4M3 value: weight-only kernels on Hopper flush block scales below it to zero."""

FP32_TINY: Final = 2.0**-149
FP32_MAX: Final = float.fromhex("0x1.fffffep127")

RECIPROCAL_6: Final = float.fromhex("0x1.555556p-3")
RECIPROCAL_448: Final = float.fromhex("0x1.24924ap-9")
RECIPROCAL_6_448: Final = float.fromhex("0x1.861862p-12")
RECIPROCAL_6_256: Final = float.fromhex("0x1.555556p-11")


def normalization_max(method: WeightMethod) -> float:
    """Return `m`, the E4M3 value that the scale of a block holding the tensor's amax gets."""
    return FOUR_OVER_SIX_MAX if method is WeightMethod.four_over_six else E4M3_MAX
