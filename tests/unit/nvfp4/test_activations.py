"""Quantized inputs against plain formulations written here, value by value."""

import bisect
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError, NumericsError
from pipeline.nvfp4 import dequantize_weight, rows
from pipeline.nvfp4.activations import count_beyond, fp8_input, nvfp4_input, sum_squares
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import WeightMethod

GOLDEN = Path(__file__).parents[2] / "golden" / "modelopt_0_47_nvfp4.npz"
INTERPRETED = Path(__file__).with_name("interpreted_activations.py")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# All finite E4M3 magnitudes, from the definition: 4 exponent bits of bias 7, 3 of mantissa.
E4M3 = [m * 2.0**-9 for m in range(8)]
E4M3 += [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]


def nearest(values, x):
    """The nearest of ascending values, the one of even index on a tie, the last beyond them."""
    above = bisect.bisect_left(values, x)
    if above == len(values):
        return values[-1]
    if values[above] == x:
        return x
    below = above - 1
    to_below, to_above = x - values[below], values[above] - x  # exact: close fp32 in fp64
    if to_below == to_above:
        return values[below if below % 2 == 0 else above]
    return values[below] if to_below < to_above else values[above]


def plain_nvfp4(x, input_scale):
    """Value by value, in numpy's fp32 scalars."""
    f, scale = np.float32, np.float32(input_scale)
    flat = x.float().numpy().reshape(-1, 16)
    out = np.zeros_like(flat)
    for block, row in zip(flat, out, strict=True):
        ratio = f(np.abs(block).max()) / (f(6) * scale)
        block_scale = f(nearest(E4M3, float(ratio))) * scale
        if block_scale > 0:
            for lane, value in enumerate(block):
                code = nearest(E2M1, float(f(abs(value)) / block_scale))
                row[lane] = math.copysign(f(code) * block_scale, value)
    return torch.from_numpy(out).view(x.shape).to(x.dtype)


def plain_fp8(x, scale):
    f = np.float32
    out = [
        math.copysign(f(nearest(E4M3, abs(float(f(value) / f(scale))))) * f(scale), value)
        for value in x.float().flatten().tolist()
    ]
    return torch.tensor(out, dtype=torch.float32).view(x.shape).to(x.dtype)


def scale_of(amax):
    return torch.tensor(amax, dtype=torch.float32) * torch.tensor(1 / 2688)


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = [(1, 16), (7, 48), (3, 5, 32), (3, 1, 2, 64), (16,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_is_the_plain_formulation(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    before = x.clone()
    scale = scale_of(x.float().abs().max().item())
    quantized = nvfp4_input(x, scale, "reference")
    assert quantized.dtype is dtype
    assert quantized.equal(plain_nvfp4(x, scale.item()))
    assert x.equal(before)
    assert quantized.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (3, 5, 8), (3, 1, 2, 7)])
def test_fp8_is_the_plain_formulation(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    before = x.clone()
    scale = torch.tensor(2.0 / 448)  # some lie beyond: they saturate
    quantized = fp8_input(x, scale, "reference")
    assert quantized.dtype is dtype
    assert quantized.equal(plain_fp8(x, scale.item()))
    assert quantized.float().abs().max() == pytest.approx(2.0, rel=2**-8)
    assert x.equal(before)


def test_beyond_the_calibrated_amax_blocks_saturate():
    amax = 2.0
    x = torch.cat([torch.full((1, 16), 50.0), torch.full((1, 16), -2.0), torch.zeros(1, 16)])
    x[2, :2] = torch.tensor([2.5, 0.3])
    quantized = nvfp4_input(x, scale_of(amax), "reference")
    assert quantized[0] == pytest.approx(torch.full((16,), amax), rel=1e-6)
    assert quantized[1] == pytest.approx(torch.full((16,), -amax), rel=1e-6)
    # The block's scale stays at that of amax: 0.3 lies between 0 and 1/6 of it and 2/6.
    assert quantized[2, :2] == pytest.approx(torch.tensor([amax, amax / 6]), rel=1e-6)
    assert quantized[2, 2:].eq(0).all()


def test_blocks_too_small_for_a_scale_become_zeros():
    """Up to 2**-10 / 448 of the amax, where the scale rounds to zero; just above, they do not."""
    amax = 448.0 * 6  # input_scale is 1 (and a power of two keeps the arithmetic exact)
    scale = torch.tensor(1.0)
    x = torch.zeros(3, 16)
    x[1, 0], x[2, 0] = 6 * 2.0**-10, 6 * 2.0**-10 * (1 + 2.0**-10)
    quantized = nvfp4_input(x, scale, "reference")
    assert quantized[:2].eq(0).all()
    assert quantized[2, 0] == 3 * 2.0**-9
    assert quantized.isfinite().all()
    assert x[2, 0] < 3e-6 * amax


def test_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([ties, -ties, torch.tensor([6.0, 0.0])])[None]
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    quantized = nvfp4_input(x * 0.5, torch.tensor(0.5), "reference") / 0.5
    assert quantized.equal(torch.cat([expected, -expected, torch.tensor([6.0, 0.0])])[None])


@pytest.mark.parametrize("case", ["gauss", "zero_blocks", "blog"])
def test_ordinary_blocks_are_what_a_dynamic_weight_quantizer_gives(case):
    """On Model Optimizer's golden tensors, packed by `max_dynamic` and dequantized."""
    with np.load(GOLDEN) as arrays:
        x = torch.from_numpy(arrays[f"{case}/weight_bf16"]).view(torch.bfloat16).float()
    backend = get_backend("reference")
    packed = backend.quantize_nvfp4(x, backend.tensor_amax(x), WeightMethod.max_dynamic)
    ours = nvfp4_input(x, packed.weight_scale_2, "reference")
    assert ours.equal(dequantize_weight(packed))


@pytest.mark.parametrize("tall", [False, True])
def test_pieces_do_not_show(monkeypatch, tall):
    x = gaussian(67, 32) if tall else gaussian(67, 3, 32).transpose(0, 1)
    amax = torch.tensor(2.0)
    scale = scale_of(2.0)

    def outcome():
        return (
            nvfp4_input(x, scale, "reference"),
            fp8_input(x, amax / 448, "reference"),
            count_beyond(x, amax, "reference"),
        )

    whole = outcome()
    monkeypatch.setattr(rows, "CPU_CHUNK_ELEMENTS", 5 * 32)
    assert all(a.equal(b) for a, b in zip(outcome(), whole, strict=True))
    assert whole[0].shape == x.shape


def test_views_are_read_where_they_lie():
    """Keys are a part of what the projection gives."""
    qkv = gaussian(6, 2, 96)
    keys = qkv[..., 32:64].unflatten(-1, (2, 16))
    assert fp8_input(keys, torch.tensor(0.01), "reference").equal(
        fp8_input(keys.clone(), torch.tensor(0.01), "reference")
    )
    assert nvfp4_input(keys, torch.tensor(1e-3), "reference").equal(
        nvfp4_input(keys.clone(), torch.tensor(1e-3), "reference")
    )
    assert count_beyond(keys, torch.tensor(1.0), "reference") == (keys.abs() > 1).sum()


def test_nothing_gives_nothing():
    x = torch.empty(0, 32, dtype=torch.bfloat16)
    for quantized in (
        nvfp4_input(x, torch.tensor(1.0), "reference"),
        fp8_input(x, torch.tensor(1.0), "reference"),
    ):
        assert (quantized.shape, quantized.dtype) == (x.shape, x.dtype)
    assert count_beyond(x, torch.tensor(1.0), "reference") == 0


def test_not_a_number_is_not_swallowed():
    x = torch.zeros(2, 16)
    x[0, 3] = torch.nan
    assert nvfp4_input(x, torch.tensor(1.0), "reference")[0, 3].isnan()
    assert fp8_input(x, torch.tensor(1.0), "reference")[0, 3].isnan()
    assert nvfp4_input(x, torch.tensor(1.0), "reference")[1].eq(0).all()


def test_counting_compares_in_fp32():
    """1.001 is 1.0 in bf16: an element of 1.0 is not beyond it, nor is 1.0078 below it."""
    x = torch.tensor([[1.0, -1.0078125, 1.0078125, 0.5, 1.0, 0.0, -3.0, 1.0]], dtype=torch.bfloat16)
    count = count_beyond(x, torch.tensor(1.001), "reference")
    assert (count.dtype, count.shape) == (torch.int64, ())
    assert count == 3
    assert count_beyond(x, torch.tensor(0.999), "reference") == 6
    assert count_beyond(x, torch.tensor(1.0), "reference") == 3
    assert count_beyond(x, torch.tensor(3.0), "reference") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_differences(dtype):
    x, other = gaussian(5, 3, 32, dtype=dtype), gaussian(5, 3, 32, dtype=dtype, seed=1)
    weights = torch.tensor([1.0, 0.0, 1.0])
    kept = [0, 2]
    found = sum_squares(x, weights, "reference")
    assert (found.dtype, found.shape) == (torch.float64, ())
    assert found.item() == pytest.approx(x[:, kept].double().square().sum().item(), rel=1e-6)
    difference = x[:, kept].double() - other[:, kept].double()
    found = sum_squares(x, weights, "reference", other)
    assert found.item() == pytest.approx(difference.square().sum().item(), rel=1e-6)


def test_refusals():
    with pytest.raises(NumericsError, match=r"shape \[4, 24\].*blocks of 16"):
        nvfp4_input(torch.zeros(4, 24), torch.tensor(1.0), "reference")
    x, one = torch.zeros(4, 2, 16), torch.tensor(1.0)
    for call in (nvfp4_input, fp8_input, count_beyond, sum_squares):
        with pytest.raises(ConfigError, match=r"triton with activations on cpu.*reference"):
            call(x, one, "triton")
        with pytest.raises(ConfigError, match="backend: found cuda"):
            call(x, one, "cuda")


def test_kernels_give_what_plain_torch_gives():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=INTERPRETED.parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
