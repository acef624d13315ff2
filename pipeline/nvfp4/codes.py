"""The bits of NVFP4: E2M1 codes, their packing two to a byte, and the positive E4M3 values.

Magnitudes go in and codes come out (`encode_e2m1`), or packed bytes go in and values come out
(`decode_e2m1`). Everything is elementwise, so results do not depend on shape, stride or device.

Round-to-nearest-even means: a magnitude midway between two values goes to the even *code*, so
.25 -> 0, .75 -> 1 (code 2), 1.25 -> 1, 1.75 -> 2 (code 4), 2.5 -> 2, 3.5 -> 4 (code 6), 5 -> 4.
"""

import torch
from torch import Tensor

from pipeline.nvfp4.formats import E2M1_MAX, E2M1_VALUES

# fp32 bits of 1.0, and the mask of the exponent.
_BITS_OF_ONE = 0x3F800000
_EXPONENT_MASK = 0x7F800000
# Adding and subtracting 1.5 * 2**22 rounds to a multiple of 0.5 in fp32 (the spacing there).
_ROUND_TO_HALF = 1.5 * 2.0**22


def encode_e2m1(magnitude: Tensor, is_negative: Tensor) -> Tensor:
    """Round fp32 magnitudes (>= 0, any shape) to uint8 codes 0..15; NaN gets code 0 (or 8).

    The sign bit is `is_negative` as given: a small negative becomes code 8, and -0.0, which is
    not below zero, becomes code 0.
    """
    code = (magnitude > 0.25).to(torch.uint8)
    code += magnitude >= 0.75
    code += magnitude > 1.25
    code += magnitude >= 1.75
    code += magnitude > 2.5
    code += magnitude >= 3.5
    code += magnitude > 5.0
    return code | (is_negative.to(torch.uint8) << 3)


def round_to_e2m1(magnitude: Tensor) -> Tensor:
    """Round fp32 magnitudes (>= 0) to E2M1 values, fp32: `encode_e2m1` without the code.

    E2M1 keeps two significant bits of a number >= 1 and halves below: a multiple of half the
    number's power of two. Adding 1.5 * 2**22 times that power rounds to just that, ties to even.
    """
    magnitude = magnitude.clamp(max=E2M1_MAX)
    exponent = (magnitude.view(torch.int32) & _EXPONENT_MASK).clamp_(min=_BITS_OF_ONE)
    shift = exponent.view(torch.float32).mul_(_ROUND_TO_HALF)
    return magnitude.add_(shift).sub_(shift)


def pack_codes(codes: Tensor) -> Tensor:
    """Pack uint8 codes [..., K] to bytes [..., K/2]: the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack bytes [..., K/2] to uint8 codes [..., K]; the inverse of `pack_codes`."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def decode_e2m1(packed: Tensor) -> Tensor:
    """Decode bytes [..., K/2] to fp32 E2M1 values [..., K].

    Code 8 decodes to +0.0, as in Model Optimizer's table.
    """
    negative = tuple(-value for value in E2M1_VALUES[1:])
    table = torch.tensor((*E2M1_VALUES, 0.0, *negative), device=packed.device)
    return table[unpack_codes(packed).int()]


def positive_e4m3_values(device: torch.device | str = "cpu") -> Tensor:
    """Return all 126 positive finite E4M3 values, float8_e4m3fn [126], ascending (bytes 1..126)."""
    return torch.arange(1, 127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
