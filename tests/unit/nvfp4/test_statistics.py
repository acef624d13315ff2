"""Errors and counts of packing, and the published figures on Gaussian weights."""

import pytest
import torch

from pipeline.nvfp4 import rows
from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.reference import dequantize_nvfp4, quantize_nvfp4, tensor_amax
from pipeline.nvfp4.statistics import (
    measure_statistics,
    squared_error_of_max,
    squared_weight,
)

FIELDS = (
    "squared_error",
    "squared_weight",
    "blocks",
    "zero_blocks",
    "blocks_m4",
    "blocks_flushed",
)


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()


def measure(weight, method, amax=None):
    amax = tensor_amax(weight) if amax is None else amax
    return measure_statistics(weight, quantize_nvfp4(weight, amax, method), amax, method)


@pytest.mark.parametrize(
    ("method", "gain", "tolerance"),
    [(WeightMethod.four_over_six, 0.164, 0.005), (WeightMethod.mse, 0.27, 0.007)],
)
def test_gain_over_max_on_gaussian_weights(method, gain, tolerance):
    weight = gaussian(1024, 512, seed=11)
    statistics = measure(weight, method)
    reference = squared_error_of_max(weight, tensor_amax(weight))
    assert 1 - (statistics.squared_error / reference).item() == pytest.approx(gain, abs=tolerance)
    if method is WeightMethod.four_over_six:
        share = statistics.blocks_m4 / statistics.blocks
        assert share.item() == pytest.approx(0.45, abs=0.02)
    else:
        assert statistics.blocks_m4 == 0


@pytest.mark.parametrize("method", WeightMethod)
def test_figures_are_those_of_the_dequantized_weights(method):
    weight = gaussian(3, 20, 64, seed=1)
    amax = tensor_amax(weight)
    statistics = measure(weight, method)
    packed = quantize_nvfp4(weight, amax, method)
    error = (dequantize_nvfp4(packed).double() - weight.double()).square().sum((-2, -1))
    assert torch.allclose(statistics.squared_error, error, rtol=1e-13, atol=0)
    squares = weight.double().square().sum((-2, -1))
    assert torch.allclose(statistics.squared_weight, squares, rtol=1e-13, atol=0)
    assert torch.equal(squared_weight(weight), statistics.squared_weight)
    assert statistics.blocks.tolist() == [80, 80, 80]
    for name in FIELDS:
        expected = torch.float64 if name.startswith("squared") else torch.int64
        assert getattr(statistics, name).dtype == expected


def test_max_of_max_is_its_own_reference():
    weight = gaussian(2, 24, 48, seed=2)
    assert torch.equal(
        measure(weight, WeightMethod.max).squared_error,
        squared_error_of_max(weight, tensor_amax(weight)),
    )


def test_shards_and_chunks_add_up(monkeypatch):
    weight = gaussian(2, 24, 96, seed=3)
    weight[0, 3, 16:48] = 0
    weight[1, :, :16] *= 1e-5
    amax = tensor_amax(weight)
    whole = measure(weight, WeightMethod.four_over_six)
    shards = [
        measure(shard, WeightMethod.four_over_six, amax)
        for piece in weight.split((7, 17), dim=1)
        for shard in piece.split((32, 64), dim=2)
    ]
    monkeypatch.setattr(rows, "CPU_CHUNK_ELEMENTS", 5 * 96)
    chunked = measure(weight, WeightMethod.four_over_six)
    for name in FIELDS:
        total = sum(getattr(shard, name) for shard in shards)
        assert torch.allclose(total, getattr(whole, name), rtol=1e-13, atol=0), name
        assert torch.equal(getattr(chunked, name), getattr(whole, name)), name
    assert torch.allclose(
        squared_error_of_max(weight, amax),
        measure(weight, WeightMethod.max).squared_error,
        rtol=1e-13,
        atol=0,
    )


def test_counts_by_hand():
    weight = torch.zeros(1, 80, dtype=torch.bfloat16)
    weight[0, 0] = 1.0  # the amax: on six, exactly
    weight[0, 16:20] = torch.tensor([0.125, 0.25, 0.375, 0.5])  # exact on four only
    weight[0, 32] = 2.0**-15  # 3.1e-5 of the amax: below the limit of 6.1e-5, flushed
    weight[0, 48] = 2.0**-13  # 1.2e-4 of the amax: above it
    statistics = measure(weight, WeightMethod.four_over_six)
    assert statistics.blocks == 5
    assert statistics.zero_blocks == 1
    assert statistics.blocks_flushed == 1
    assert statistics.blocks_m4 == 1
    under_mse = measure(weight, WeightMethod.mse)
    assert under_mse.zero_blocks == 1  # whose scale is 2**-9, and which is not flushed
    assert under_mse.blocks_m4 == 0


def test_no_matrices():
    weight = torch.empty(0, 8, 32, dtype=torch.bfloat16)
    assert measure(weight, WeightMethod.four_over_six).blocks.shape == (0,)
    assert squared_error_of_max(weight, torch.empty(0)).shape == (0,)
