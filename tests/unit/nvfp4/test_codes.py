"""E2M1 and E4M3 bits: every byte round-trips, and ties go to the even code."""

import pytest
import torch

from pipeline.nvfp4.codes import (
    decode_e2m1,
    encode_e2m1,
    pack_codes,
    positive_e4m3_values,
    round_to_e2m1,
    unpack_codes,
)
from pipeline.nvfp4.formats import E2M1_VALUES

THRESHOLDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def test_every_byte_round_trips():
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = unpack_codes(packed)
    assert torch.equal(codes[:, 0], packed[:, 0] & 15)  # the even column is the low nibble
    assert torch.equal(pack_codes(codes), packed)
    values = decode_e2m1(packed)
    magnitudes = torch.tensor(E2M1_VALUES)[(codes & 7).long()]
    assert torch.equal(values, torch.where(codes >= 8, -magnitudes, magnitudes))
    assert torch.equal(encode_e2m1(values.abs(), codes >= 8), codes)


def test_every_positive_e4m3_value_round_trips():
    values = positive_e4m3_values()
    assert values.view(torch.uint8).tolist() == list(range(1, 127))
    exact = [
        (8 + byte % 8) / 8 * 2.0 ** (byte // 8 - 7) if byte >= 8 else byte * 2.0**-9
        for byte in range(1, 127)
    ]
    assert values.float().tolist() == exact
    assert exact[0] == 2.0**-9
    assert exact[-1] == 448.0
    assert torch.equal(
        values.float().to(torch.float8_e4m3fn).view(torch.uint8), values.view(torch.uint8)
    )


def test_a_tie_goes_to_the_even_code():
    no_sign = torch.zeros(7, dtype=torch.bool)
    assert encode_e2m1(THRESHOLDS, no_sign).tolist() == [0, 2, 2, 4, 4, 6, 6]
    below = torch.nextafter(THRESHOLDS, torch.zeros(7))
    above = torch.nextafter(THRESHOLDS, torch.full((7,), 9.0))
    assert encode_e2m1(below, no_sign).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert encode_e2m1(above, no_sign).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_rounding_to_values_agrees_with_codes():
    magnitude = torch.cat([
        torch.linspace(0, 9, 50001),
        THRESHOLDS,
        torch.nextafter(THRESHOLDS, torch.zeros(7)),
        torch.nextafter(THRESHOLDS, torch.full((7,), 9.0)),
        torch.tensor([0.0, 2.0**-149, 1e-30, 1e30, torch.inf]),
    ])  # fmt: skip
    codes = encode_e2m1(magnitude, torch.zeros_like(magnitude, dtype=torch.bool))
    assert torch.equal(round_to_e2m1(magnitude), torch.tensor(E2M1_VALUES)[codes.long()])


@pytest.mark.parametrize(("weight", "code"), [(-1e-30, 8), (-0.0, 0), (0.0, 0), (-6.0, 15)])
def test_sign_bit_is_weight_below_zero(weight, code):
    values = torch.tensor([weight])
    assert encode_e2m1(values.abs(), values < 0).item() == code


def test_nan_magnitude_gets_the_code_of_zero():
    assert encode_e2m1(torch.tensor([torch.nan]), torch.tensor([False])).item() == 0
