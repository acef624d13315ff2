"""The kernel for inputs against plain torch, on the CPU, under Triton's interpreter.

`test_activations.py` runs this file in a process of its own, where TRITON_INTERPRET is set before
triton is imported. Results are written in fp32: the interpreter cuts off what bf16 cannot hold.
"""

import pytest
import torch

from pipeline.nvfp4 import kernels_activations
from pipeline.nvfp4.activations import nvfp4_input
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


def test_nothing_to_do():
    x = torch.empty(0, 32)
    kernels_activations.quantize_blocks(x, torch.tensor(1e-3), torch.empty_like(x))
