"""Every backend on a GPU: byte for byte what the reference gives on the CPU."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.reference import (
    PackedWeight,
    block_amax,
    dequantize_nvfp4,
    fp8_squared_errors,
    quantize_fp8,
    quantize_nvfp4,
    tensor_amax,
)
from pipeline.nvfp4.statistics import WeightStatistics, measure_statistics, squared_weight

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
BACKENDS = ("reference", "triton")
COUNTS = ("blocks", "zero_blocks", "blocks_m4", "blocks_flushed")
SUMS = ("squared_error", "squared_weight", "squared_error_of_max")
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


def _near_thresholds() -> torch.Tensor:
    """fp32 weights within two ulp of an E2M1 threshold times a scale that their block will have."""
    scales = torch.arange(8, 120, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    thresholds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    unit = torch.tensor([0.3, 0.7, 1.1])[:, None]
    blocks = torch.cat([thresholds, thresholds, torch.tensor([6.0, 0.5])]) * scales[:, None, None]
    bits = (blocks * unit).view(torch.int32)
    generator = torch.Generator().manual_seed(3)
    bits += torch.randint(-2, 3, bits.shape, generator=generator, dtype=torch.int32)
    matrices = bits.view(torch.float32).transpose(0, 1).reshape(3, 1, -1)
    largest = (448.0 * 6 * unit)[:, None].expand(3, 1, 16)
    return torch.cat([matrices, -matrices, largest], -1)


def _heavy_tailed(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    scale = torch.randn(*shape[:-1], 1, generator=generator).mul_(2).exp_()
    values = torch.randn(shape, generator=generator) * scale * 0.02
    return (values / torch.rand(shape, generator=generator).clamp(min=1e-3)).bfloat16()


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
    "fp32": lambda: _random(64, 256).float() * 1.1,
    "near_thresholds": _near_thresholds,
    "heavy_tailed": lambda: _heavy_tailed(3, 256, 512),
    "huge": lambda: _random(16, 64, scale=1e37),
    "tiny": lambda: _random(16, 64, scale=1e-37),
    "largest": lambda: torch.full((2, 32), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
    "zeros": lambda: torch.zeros(3, 32, dtype=torch.bfloat16),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    return get_backend(request.param)


@pytest.mark.parametrize("factor", [1.0, 1.7, 64.0])
@pytest.mark.parametrize("method", list(WeightMethod))
@pytest.mark.parametrize("name", WEIGHTS)
def test_nvfp4(backend, name: str, method: WeightMethod, factor: float) -> None:
    """Bytes and counts are equal; sums agree but for the order and width of additions."""
    weight, amax, expected, figures = _on_cpu(name, method, factor)
    ours, measured = backend.pack_nvfp4(weight.to(GPU), amax.to(GPU), method, compare_to_max=True)
    _assert_same(ours, expected)
    for dtype in (torch.float32, torch.bfloat16):
        values = backend.dequantize_nvfp4(ours, dtype)
        assert torch.equal(_bytes(values), _bytes(dequantize_nvfp4(expected, dtype)))
    for field in COUNTS:
        assert torch.equal(getattr(measured, field).cpu(), getattr(figures, field)), field
    for field in SUMS:
        _assert_close(getattr(measured, field), getattr(figures, field))


@functools.cache
def _on_cpu(
    name: str, method: WeightMethod, factor: float
) -> tuple[torch.Tensor, torch.Tensor, PackedWeight, WeightStatistics]:
    """The weight, its amax times a factor, and what the reference makes of them."""
    weight = WEIGHTS[name]()
    amax = (tensor_amax(weight) * factor).clamp(max=torch.finfo(torch.float32).max)
    packed = quantize_nvfp4(weight, amax, method)
    figures = measure_statistics(weight, packed, amax, method, compare_to_max=True)
    return weight, amax, packed, figures


@pytest.mark.parametrize("factor", [1.0, 1.5, 0.3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_fp8(backend, name: str, factor: float) -> None:
    weight = WEIGHTS[name]()
    amax = tensor_amax(weight) * factor
    codes, weight_scale = quantize_fp8(weight, amax)
    ours = backend.pack_fp8(weight.to(GPU), amax.to(GPU))
    assert torch.equal(ours.weight_scale.cpu(), weight_scale)
    assert torch.equal(_bytes(ours.codes), _bytes(codes))
    multipliers = (1.0, 1.25, 1.5)
    errors = fp8_squared_errors(weight, amax, multipliers)
    _assert_close(ours.squared_error, errors[..., 0])
    _assert_close(ours.squared_weight, squared_weight(weight))
    _assert_close(backend.fp8_squared_errors(weight.to(GPU), amax.to(GPU), multipliers), errors)


def test_fp8_of_odd_sizes(backend) -> None:
    weight = _random(5, 33, 77)
    amax = tensor_amax(weight)
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=GPU)
    assert backend.pack_fp8(weight.to(GPU), amax.to(GPU), out).codes is out
    assert torch.equal(_bytes(out), _bytes(quantize_fp8(weight, amax)[0]))


@pytest.mark.parametrize("name", WEIGHTS)
def test_amax(backend, name: str) -> None:
    weight = WEIGHTS[name]()
    assert torch.equal(backend.tensor_amax(weight.to(GPU)).cpu(), tensor_amax(weight))
    assert torch.equal(block_amax(weight.to(GPU)).cpu(), block_amax(weight))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_amax_shows_what_is_not_finite(backend, bad: float) -> None:
    weight = _random(4, 50, 480).to(GPU)
    weight[2, 33, 17] = bad
    assert backend.tensor_amax(weight).isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("method", list(WeightMethod))
def test_many_random_weights(method: WeightMethod) -> None:
    """Kernels against the reference, both on the GPU: 2**26 weights of many scales."""
    weight = _heavy_tailed(4, 1024, 1024).to(GPU).repeat(4, 4, 1)
    weight = (weight.float() * torch.rand(weight.shape, device=GPU)).bfloat16()
    amax = tensor_amax(weight)
    ours, measured = get_backend("triton").pack_nvfp4(weight, amax, method, compare_to_max=True)
    expected = quantize_nvfp4(weight, amax, method)
    _assert_same(ours, expected)
    again, repeated = get_backend("triton").pack_nvfp4(weight, amax, method, compare_to_max=True)
    _assert_same(again, expected)
    figures = measure_statistics(weight, expected, amax, method, compare_to_max=True)
    for field in SUMS:
        assert torch.equal(getattr(measured, field), getattr(repeated, field)), field
        _assert_close(getattr(measured, field), getattr(figures, field).cpu())


@pytest.mark.parametrize("method", list(WeightMethod))
def test_part_of_a_stack_beyond_2_31_weights(method: WeightMethod) -> None:
    """A layer's expert stack of 2.7e9 weights: int64 offsets, and buffers that the caller gave."""
    backend = get_backend("triton")
    stack = torch.empty(257, 5120, 2048, dtype=torch.bfloat16, device=GPU)
    stack.view(torch.int16).random_(-(2**15), 2**15).bitwise_and_(0b1011_1111_1111_1111 - 2**16)
    amax = backend.tensor_amax(stack)
    out, measured = backend.pack_nvfp4(stack, amax, method)
    codes, scale, _, _ = backend.pack_fp8(stack, amax)
    values = backend.dequantize_nvfp4(out, torch.bfloat16)
    for part in (slice(0, 1), slice(128, 129), slice(204, 206), slice(256, 257)):
        expected = quantize_nvfp4(stack[part], amax[part], method)
        assert torch.equal(amax[part], tensor_amax(stack[part]))
        chosen = PackedWeight(out.codes[part], out.weight_scale[part], out.weight_scale_2[part])
        _assert_same(chosen, expected)
        figures = measure_statistics(stack[part], expected, amax[part], method)
        _assert_close(measured.squared_error[part], figures.squared_error.cpu())
        assert torch.equal(_bytes(values[part]), _bytes(dequantize_nvfp4(expected, values.dtype)))
        assert torch.equal(_bytes(codes[part]), _bytes(quantize_fp8(stack[part], amax[part])[0]))
        assert torch.equal(scale[part], quantize_fp8(stack[part], amax[part])[1])


def _assert_same(ours: PackedWeight, expected: PackedWeight) -> None:
    assert torch.equal(ours.weight_scale_2.cpu(), expected.weight_scale_2.cpu())
    assert torch.equal(_bytes(ours.weight_scale), _bytes(expected.weight_scale))
    assert torch.equal(ours.codes.cpu(), expected.codes.cpu())


def _assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=0.0)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().contiguous().view(torch.uint8)
