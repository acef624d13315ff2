"""The kernels against the reference, on the CPU, under Triton's interpreter.

`test_kernels.py` runs this file in a process of its own, where TRITON_INTERPRET is set before
triton is imported. The interpreter rounds twice in a fused multiply-add; here it rounds once, as a
GPU does, because the kernels' exact division lives by that.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pipeline.nvfp4 import kernels_amax, kernels_dequantize, kernels_fp8, kernels_nvfp4, reference
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.statistics import measure_statistics

GOLDEN = Path(__file__).parents[2] / "golden" / "modelopt_0_47_nvfp4.npz"
COUNTS = ("blocks", "zero_blocks", "blocks_m4", "blocks_flushed")
SUMS = ("squared_error", "squared_weight", "squared_error_of_max")


@pytest.fixture(autouse=True)
def _one_rounding_per_fused_multiply_add(monkeypatch):
    def create_fma(self, x, y, z):
        # A product of fp32 is exact in fp64. The sum's own rounding is 2**-29 of an fp32 ulp.
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
            return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


def gaussian(*shape, seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def golden(case):
    with np.load(GOLDEN) as arrays:
        return torch.from_numpy(arrays[f"{case}/weight_bf16"]).view(torch.bfloat16)


def outliers():
    weight = gaussian(9, 48, seed=1)
    weight[::3, ::16] *= 1000
    weight[5] = 0
    weight[6, 16:32] = -0.0
    weight[7] *= 1e-6
    weight[8] *= 1e-30
    return weight.float()


def every_bf16(below):
    values = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)
    values = values[values.float().abs() <= below]
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(1))
    # fp32, because the interpreter reads subnormal bf16 wrongly.
    return values[order[:192]].view(-1, 64).float()


def ties():
    """Multiples of an eighth: midpoints of E2M1 and of E4M3 under power-of-two scales."""
    steps = torch.arange(-56, 57).float() / 8
    rows = [steps.roll(shift)[:64] * 2.0**power for shift in (0, 17) for power in (-9, 0, 7)]
    return torch.stack(rows).bfloat16()


def near_thresholds():
    """fp32 weights within two ulp of a threshold times a scale that a block will have."""
    scales = torch.arange(8, 120, 7, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    thresholds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    blocks = (torch.cat([thresholds, thresholds, torch.tensor([6.0, 0.5])]) * scales[:, None]) * 0.3
    bits = blocks.view(torch.int32)
    generator = torch.Generator().manual_seed(3)
    bits += torch.randint(-2, 3, bits.shape, generator=generator, dtype=torch.int32)
    largest = torch.full((1, 16), 448.0 * 6 * 0.3)
    return torch.cat([blocks, -blocks, largest]).view(1, -1)


WEIGHTS = {
    "gauss": lambda: golden("gauss")[:4],
    "zero_blocks": lambda: golden("zero_blocks")[:2],
    "blog": lambda: golden("blog")[:2],
    "outliers": outliers,
    "ties": ties,
    "near_thresholds": near_thresholds,
    "huge": lambda: gaussian(1, 64, seed=4, scale=1e37),
    "tiny": lambda: gaussian(1, 64, seed=5, scale=1e-37).float(),
    "stack": lambda: gaussian(3, 5, 48, seed=7, scale=3.0),
    "zeros": lambda: torch.zeros(2, 3, 32, dtype=torch.bfloat16),
    "constant": lambda: torch.full((3, 32), -0.75, dtype=torch.bfloat16),
    "fp32": lambda: gaussian(4, 48, seed=6).float() * 1.1,
    "every_bf16": lambda: every_bf16(3.4e38),
    "subnormal": lambda: every_bf16(1e-38),
    "largest": lambda: torch.full((2, 32), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
}
# The search tries every scale of every block: a second for a few blocks, in the interpreter.
SEARCHED = ("gauss", "zero_blocks", "outliers", "ties", "near_thresholds", "huge", "tiny", "zeros")
NVFP4_CASES = [
    (name, method, 1.0)
    for name in WEIGHTS
    for method in WeightMethod
    if method is not WeightMethod.mse or name in SEARCHED
]
NVFP4_CASES += [("near_thresholds", method, 1.7) for method in WeightMethod]
NVFP4_CASES += [("many_tiles", WeightMethod.four_over_six, 1.0)]
WEIGHTS["many_tiles"] = lambda: gaussian(121, 544, seed=8)
FP8_CASES = [
    *((name, 1.0) for name in WEIGHTS),
    *((name, factor) for name in ("gauss", "outliers", "ties") for factor in (1.5, 0.3)),
]


def bytes_of(values):
    return values.contiguous().view(torch.uint8)


def assert_same(ours, expected):
    assert ours.weight_scale_2.equal(expected.weight_scale_2)
    assert bytes_of(ours.weight_scale).equal(bytes_of(expected.weight_scale))
    assert ours.codes.equal(expected.codes)


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("name", "method", "factor"), NVFP4_CASES)
def test_nvfp4(name, method, factor):
    weight = WEIGHTS[name]()
    amax = (reference.tensor_amax(weight) * factor).clamp(max=torch.finfo(torch.float32).max)
    expected = reference.quantize_nvfp4(weight, amax, method)
    ours, measured = kernels_nvfp4.pack_nvfp4(weight, amax, method, compare_to_max=True)
    assert_same(ours, expected)
    figures = measure_statistics(weight, expected, amax, method, compare_to_max=True)
    for field in COUNTS:
        assert getattr(measured, field).equal(getattr(figures, field)), field
    for field in SUMS:
        assert_close(getattr(measured, field), getattr(figures, field))
    values = kernels_dequantize.dequantize_nvfp4(ours)
    assert bytes_of(values).equal(bytes_of(reference.dequantize_nvfp4(expected)))


def test_search_of_a_matrix_by_several_programs(monkeypatch):
    launch = kernels_nvfp4._SWEEP_LAUNCH._replace(tiles=1)
    monkeypatch.setattr(kernels_nvfp4, "_SWEEP_LAUNCH", launch)
    weight = gaussian(5, 16 * launch.blocks // 2, seed=8)
    amax = reference.tensor_amax(weight)
    ours, _ = kernels_nvfp4.pack_nvfp4(weight, amax, WeightMethod.mse)
    assert_same(ours, reference.quantize_nvfp4(weight, amax, WeightMethod.mse))


def test_without_comparison_the_error_of_max_is_the_own_error():
    weight = gaussian(4, 64)
    amax = reference.tensor_amax(weight)
    _, measured = kernels_nvfp4.pack_nvfp4(weight, amax, WeightMethod.four_over_six)
    assert measured.squared_error_of_max.equal(measured.squared_error)


def test_given_buffers_and_part_of_a_stack():
    method = WeightMethod.four_over_six
    stack = gaussian(5, 6, 48, seed=9)
    amax = reference.tensor_amax(stack)
    whole = kernels_nvfp4.empty_packed(stack)
    for tensor in (whole.codes, whole.weight_scale.view(torch.uint8)):
        tensor.fill_(7)
    part = slice(1, 3)
    out = reference.PackedWeight(
        whole.codes[part], whole.weight_scale[part], whole.weight_scale_2[part]
    )
    ours, _ = kernels_nvfp4.pack_nvfp4(stack[part], amax[part], method, out=out)
    assert ours is out
    assert_same(out, reference.quantize_nvfp4(stack[part], amax[part], method))
    assert (whole.codes[[0, 3, 4]] == 7).all()
    assert (bytes_of(whole.weight_scale[[0, 3, 4]]) == 7).all()
    every_other, _ = kernels_nvfp4.pack_nvfp4(stack[::2], amax[::2], method)
    assert_same(every_other, reference.quantize_nvfp4(stack[::2], amax[::2], method))
    odd = torch.empty(stack.numel() + 1, dtype=stack.dtype)[1:].view(stack.shape).copy_(stack)
    shifted, _ = kernels_nvfp4.pack_nvfp4(odd, amax, method)
    assert_same(shifted, reference.quantize_nvfp4(stack, amax, method))
    columns, _ = kernels_nvfp4.pack_nvfp4(stack[..., 16:], amax, method)
    assert_same(columns, reference.quantize_nvfp4(stack[..., 16:], amax, method))


def test_dequantizing_into_a_part_of_a_stack():
    stack = gaussian(3, 6, 48, seed=11)
    packed = reference.quantize_nvfp4(stack[1:], reference.tensor_amax(stack)[1:], WeightMethod.max)
    out = torch.full(stack.shape, 7.0)
    ours = kernels_dequantize.dequantize_nvfp4(packed, out=out[1:])
    assert ours.data_ptr() == out[1:].data_ptr()
    assert bytes_of(out[1:]).equal(bytes_of(reference.dequantize_nvfp4(packed)))
    assert out[0].eq(7).all()


@pytest.mark.parametrize("shape", [(16,), (3, 5, 48), (257, 32), (0, 32)])
def test_flushed_blocks_become_zeros_and_no_others(shape):
    """Every scale byte that a block may have, 2**-6 among them."""
    codes = torch.arange(1, 127, dtype=torch.uint8)
    count = torch.Size(shape).numel() // 16
    scales = codes.repeat(5)[:count].view(*shape[:-1], shape[-1] // 16).view(torch.float8_e4m3fn)
    weight, expected = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    get_backend("reference").zero_flushed(expected, scales)
    kernels_dequantize.zero_flushed(weight, scales)
    assert weight.isnan().equal(expected.isnan())
    assert weight.nan_to_num(0.0).eq(0).all()
    kept = scales.float() >= 2.0**-6
    assert weight.isnan().equal(kept.repeat_interleave(16, -1))


@pytest.mark.parametrize(("name", "factor"), FP8_CASES)
def test_fp8(name, factor):
    weight = WEIGHTS[name]()
    amax = reference.tensor_amax(weight) * factor
    codes, scale = reference.quantize_fp8(weight, amax)
    ours = kernels_fp8.pack_fp8(weight, amax)
    assert bytes_of(ours[0]).equal(bytes_of(codes))
    assert ours[1].equal(scale)
    multipliers = (1.0, 1.25, 1.5)
    expected = reference.fp8_squared_errors(weight, amax, multipliers)
    assert_close(ours[2], expected[..., 0])
    assert_close(ours[3], weight.double().square().sum((-2, -1)))
    assert_close(kernels_fp8.fp8_squared_errors(weight, amax, multipliers), expected)


def test_fp8_of_odd_sizes_into_a_buffer():
    weight = gaussian(3, 5, 7, seed=10)
    amax = reference.tensor_amax(weight)
    out = torch.empty(3, 5, 7, dtype=torch.float8_e4m3fn)
    assert kernels_fp8.pack_fp8(weight, amax, out)[0] is out
    assert bytes_of(out).equal(bytes_of(reference.quantize_fp8(weight, amax)[0]))


@pytest.mark.parametrize("name", WEIGHTS)
def test_amax(name):
    weight = WEIGHTS[name]()
    assert kernels_amax.tensor_amax(weight).equal(reference.tensor_amax(weight))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_amax_shows_what_is_not_finite(bad):
    weight = gaussian(4, 5, 48)
    weight[2, 3, 17] = bad
    amax = kernels_amax.tensor_amax(weight)
    assert amax.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("method", WeightMethod)
def test_no_matrices(method):
    weight = torch.empty(0, 8, 32, dtype=torch.bfloat16)
    amax = kernels_amax.tensor_amax(weight)
    assert amax.shape == (0,)
    packed, measured = kernels_nvfp4.pack_nvfp4(weight, amax, method)
    assert packed.codes.shape == (0, 8, 16)
    assert measured.squared_error.shape == (0,)
    assert kernels_dequantize.dequantize_nvfp4(packed).shape == (0, 8, 32)
    assert kernels_fp8.fp8_squared_errors(weight, amax, (1.0, 1.5)).shape == (0, 2)
