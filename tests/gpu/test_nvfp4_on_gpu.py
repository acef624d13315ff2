"""The reference numerics on a GPU: byte for byte what the CPU gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.reference import (
    block_amax,
    dequantize_nvfp4,
    fp8_squared_errors,
    quantize_fp8,
    quantize_nvfp4,
    tensor_amax,
)
from pipeline.nvfp4.statistics import measure_statistics, squared_error_of_max, squared_weight

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
VECTORS = Path(__file__).parents[1] / "golden" / "modelopt_0_47_nvfp4.npz"


def _golden(case: str) -> torch.Tensor:
    with np.load(VECTORS) as arrays:
        return torch.from_numpy(arrays[f"{case}/weight_bf16"]).view(torch.bfloat16)


def _every_bf16(below: float) -> torch.Tensor:
    """All bf16 values of magnitude up to `below`, in an order that mixes magnitudes: [N, 64]."""
    values = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)
    values = values[values.float().abs() <= below]
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(1))
    values = values[order]
    return values[: values.numel() // 64 * 64].view(-1, 64)


def _ties() -> torch.Tensor:
    """Multiples of an eighth: midpoints of E2M1 and of E4M3 under power-of-two scales."""
    steps = torch.arange(-56, 57).float() / 8
    rows = [steps.roll(shift)[:64] * 2.0**power for shift in (0, 17, 40) for power in range(-9, 9)]
    return torch.stack(rows).bfloat16()


def _random(*shape: int, scale: float = 0.02) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return (values * scale).bfloat16()


def _outliers() -> torch.Tensor:
    weight = _random(96, 128)
    weight[::3, ::16] *= 1000
    weight[5] = 0
    weight[6, 16:32] = -0.0
    weight[7] *= 1e-30
    return weight


WEIGHTS = {
    "gauss": lambda: _golden("gauss"),
    "zero_blocks": lambda: _golden("zero_blocks"),
    "blog": lambda: _golden("blog"),
    "every_bf16_to_1": lambda: _every_bf16(1.0),
    "every_bf16_to_1e10": lambda: _every_bf16(1e10),
    "every_bf16": lambda: _every_bf16(3.4e38),
    "subnormal": lambda: _every_bf16(1e-38),
    "ties": _ties,
    "outliers": _outliers,
    "matrix": lambda: _random(1111, 1040),
    "stack": lambda: _random(5, 77, 160, scale=3.0),
    "fp32": lambda: _random(64, 256).float(),
    "zeros": lambda: torch.zeros(3, 32, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("factor", [1.0, 1.7, 64.0])
@pytest.mark.parametrize("method", list(WeightMethod))
@pytest.mark.parametrize("name", WEIGHTS)
def test_nvfp4_bytes(name: str, method: WeightMethod, factor: float) -> None:
    weight = WEIGHTS[name]()
    amax = (tensor_amax(weight) * factor).clamp(max=torch.finfo(torch.float32).max)
    ours = quantize_nvfp4(weight.to(GPU), amax.to(GPU), method)
    expected = quantize_nvfp4(weight, amax, method)
    assert torch.equal(ours.weight_scale_2.cpu(), expected.weight_scale_2)
    assert torch.equal(_bytes(ours.weight_scale), _bytes(expected.weight_scale))
    assert torch.equal(ours.codes.cpu(), expected.codes)
    assert torch.equal(dequantize_nvfp4(ours).cpu(), dequantize_nvfp4(expected))


@pytest.mark.parametrize("factor", [1.0, 1.5, 0.3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_fp8_bytes(name: str, factor: float) -> None:
    weight = WEIGHTS[name]()
    amax = tensor_amax(weight) * factor
    codes, weight_scale = quantize_fp8(weight.to(GPU), amax.to(GPU))
    expected_codes, expected_scale = quantize_fp8(weight, amax)
    assert torch.equal(weight_scale.cpu(), expected_scale)
    assert torch.equal(_bytes(codes), _bytes(expected_codes))


@pytest.mark.parametrize("name", WEIGHTS)
def test_amax(name: str) -> None:
    weight = WEIGHTS[name]()
    assert torch.equal(tensor_amax(weight.to(GPU)).cpu(), tensor_amax(weight))
    assert torch.equal(block_amax(weight.to(GPU)).cpu(), block_amax(weight))


@pytest.mark.parametrize("name", ["gauss", "zero_blocks", "blog", "outliers", "matrix", "stack"])
def test_statistics(name: str) -> None:
    """Counts are equal; fp64 sums agree but for the order of additions."""
    weight = WEIGHTS[name]()
    amax, method = tensor_amax(weight), WeightMethod.four_over_six
    expected = measure_statistics(weight, quantize_nvfp4(weight, amax, method), amax, method)
    weight, amax = weight.to(GPU), amax.to(GPU)
    ours = measure_statistics(weight, quantize_nvfp4(weight, amax, method), amax, method)
    for field in ("blocks", "zero_blocks", "blocks_m4", "blocks_flushed"):
        assert torch.equal(getattr(ours, field).cpu(), getattr(expected, field)), field
    for field in ("squared_error", "squared_weight"):
        _assert_close(getattr(ours, field), getattr(expected, field))
    _assert_close(squared_weight(weight), squared_weight(weight.cpu()))
    _assert_close(
        squared_error_of_max(weight, amax), squared_error_of_max(weight.cpu(), amax.cpu())
    )
    multipliers = (1.0, 1.25, 1.5)
    _assert_close(
        fp8_squared_errors(weight, amax, multipliers),
        fp8_squared_errors(weight.cpu(), amax.cpu(), multipliers),
    )


def _assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-12, atol=0.0)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().contiguous().view(torch.uint8)
