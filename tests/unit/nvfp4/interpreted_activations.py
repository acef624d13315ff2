"""The kernels for activations against plain torch, on the CPU, under Triton's interpreter.

`test_activations.py` runs this file in a process of its own, where TRITON_INTERPRET is set before
triton is imported. Results are written in fp32: the interpreter cuts off what bf16 cannot hold.
"""

import pytest
import torch

from pipeline.nvfp4 import kernels_activations, kernels_squares
from pipeline.nvfp4.activations import count_beyond, fp8_input, nvfp4_input, sum_squares
from tests.unit.nvfp4.interpreted_kernels import WEIGHTS, _one_rounding_per_fused_multiply_add

__all__ = ["_one_rounding_per_fused_multiply_add"]  # applies to every test here

NAMES = sorted(set(WEIGHTS) - {"many_tiles"})


@pytest.mark.parametrize("factor", [1.0, 0.3, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_bits_of_plain_torch(name, factor):
    x = WEIGHTS[name]()
    amax = x.float().abs().max() * factor
    scale = torch.where(amax > 0, amax / 2688, 1.0).clamp(2.0**-149, 3e38)
    out = torch.full_like(x, 7, dtype=torch.float32)
    kernels_activations.quantize_blocks(x, scale, out)
    expected = nvfp4_input(x.float(), scale, "reference")
    assert out.view(torch.uint8).equal(expected.view(torch.uint8))


def test_several_programs_and_a_part_of_one():
    x = torch.randn(67, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full_like(x, 7, dtype=torch.float32)
    scale = torch.tensor(3.0 / 2688)
    kernels_activations.quantize_blocks(x, scale, out)
    assert out.equal(nvfp4_input(x.float(), scale, "reference"))


def test_not_a_number_stays():
    x = torch.randn(2, 32)
    x[0, 3], x[1, 16:] = torch.nan, 0
    x[1, 20] = torch.nan
    out = torch.empty_like(x)
    kernels_activations.quantize_blocks(x, torch.tensor(1e-3), out)
    assert out.isnan().equal(x.isnan())


@pytest.mark.parametrize("factor", [1.0, 0.3, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_bits_of_plain_torch_in_fp8(name, factor):
    x = WEIGHTS[name]()
    amax = x.float().abs().max() * factor
    scale = torch.where(amax > 0, amax / 448, 1.0).clamp(2.0**-149, 3e38)
    out = torch.full_like(x, 7, dtype=torch.float32)
    kernels_activations.quantize_fp8(x, scale, out)
    expected = fp8_input(x.float(), scale, "reference")
    assert out.view(torch.uint8).equal(expected.view(torch.uint8))


def special_values():
    """Every E4M3 midpoint and its neighbours in fp32, both zeros, the least and the largest."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (codes[1:] + codes[:-1]) / 2
    near = [(midpoints.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)]
    rest = torch.tensor([0.0, 2.0**-149, 448.0, 463.9, 464.0, 3e38, torch.inf])
    return torch.cat([codes, *near, rest])


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3, 2.0**-100, 1e-38, 2.0**-149])
def test_every_tie_zero_and_huge_value_in_fp8(scale):
    x = special_values()
    x = torch.cat([x, -x, x * scale, -x * scale])
    out = torch.empty_like(x)
    kernels_activations.quantize_fp8(x, torch.tensor(scale), out)
    expected = fp8_input(x[None], torch.tensor(scale), "reference")[0]
    assert out.view(torch.int32).equal(expected.view(torch.int32))
    assert out.signbit().equal(x.signbit())


def test_in_fp8_not_a_number_stays():
    x = torch.tensor([1.0, torch.nan, -torch.nan, 0.0, -3.0])
    out = torch.empty_like(x)
    kernels_activations.quantize_fp8(x, torch.tensor(1e-3), out)
    assert out.isnan().equal(x.isnan())


@pytest.mark.parametrize("size", [1, 4095, 4097, 2 * 65536 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_every_kind(size, dtype):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    x[0] = torch.nan
    scale, out = torch.tensor(1.5 / 448), torch.full((size,), 7.0)
    kernels_activations.quantize_fp8(x, scale, out)
    expected = fp8_input(x.float()[None], scale, "reference")[0]
    assert out[1:].equal(expected[1:])
    for bound in (1.5, 0.0, -1.0, torch.inf):
        count = kernels_activations.count_beyond(x, torch.tensor(bound))
        assert (count.dtype, count.shape) == (torch.int64, ())
        assert count == count_beyond(x[None], torch.tensor(bound), "reference")


def squares_of(x, weights, subtracted=None):
    return (kernels_squares.sum_squares(x, subtracted) * weights).sum()


@pytest.mark.parametrize("shape", [(3, 2, 64), (1, 1, 1), (2, 3, 2049), (5, 1, 4096), (0, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weights = torch.ones(shape[1])
    weights[-1] = 0.5
    for scale in (1.0, 1e15, 1e-15):
        for subtracted in (None, other * scale):
            found = squares_of(x * scale, weights, subtracted)
            expected = sum_squares(x * scale, weights, "reference", subtracted)
            assert (found.dtype, found.shape) == (torch.float64, ())
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert squares_of(x, weights, x) == 0


def test_squares_of_views_and_of_what_is_not_finite():
    x = torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 0.0, 1.0])
    view = x.transpose(0, 1)
    expected = sum_squares(view.contiguous(), torch.ones(4), "reference", x[:3, :1] + 0 * view)
    found = squares_of(view, torch.ones(4), x[:3, :1] + 0 * view)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    x[1, 1] = 1e3
    torch.testing.assert_close(
        squares_of(x, weights), sum_squares(x, weights, "reference"), rtol=1e-6, atol=0.0
    )
    for bad in (torch.nan, torch.inf):
        x[0, 2, 5] = bad
        assert not squares_of(x, weights).isfinite()


def test_nothing_to_do():
    x = torch.empty(0, 32)
    kernels_activations.quantize_blocks(x, torch.tensor(1e-3), torch.empty_like(x))
    kernels_activations.quantize_fp8(x, torch.tensor(1e-3), torch.empty_like(x))
    assert kernels_activations.count_beyond(x, torch.tensor(1e-3)) == 0
