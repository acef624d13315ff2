"""What both backends promise, tried on the one that runs on a CPU."""

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.kernels_nvfp4 import empty_packed
from pipeline.nvfp4.reference import (
    dequantize_nvfp4,
    fp8_squared_errors,
    quantize_fp8,
    quantize_nvfp4,
)
from pipeline.nvfp4.statistics import squared_error_of_max, squared_weight


@pytest.fixture
def weight():
    return torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_unknown_backends_are_refused():
    with pytest.raises(ConfigError, match=r"backend: found cuda; supported: reference, triton\."):
        get_backend("cuda")


def test_kernels_refuse_tensors_on_a_cpu(weight):
    backend = get_backend("triton")
    amax = get_backend("reference").tensor_amax(weight)
    packed = quantize_nvfp4(weight, amax, WeightMethod.max)
    for call in (
        lambda: backend.tensor_amax(weight),
        lambda: backend.pack_nvfp4(weight, amax, WeightMethod.max),
        lambda: backend.pack_fp8(weight, amax),
        lambda: backend.fp8_squared_errors(weight, amax, (1.0,)),
        lambda: backend.dequantize_nvfp4(packed),
        lambda: backend.zero_flushed(weight, packed.weight_scale),
    ):
        with pytest.raises(ConfigError, match="found triton with tensors on cpu"):
            call()


@pytest.mark.parametrize("method", WeightMethod)
def test_reference_packs_and_measures(weight, method):
    backend = get_backend("reference")
    amax = backend.tensor_amax(weight)
    expected = quantize_nvfp4(weight, amax, method)
    out = empty_packed(weight)
    packed, measured = backend.pack_nvfp4(weight, amax, method, compare_to_max=True, out=out)
    assert packed is out
    for ours in (out, backend.quantize_nvfp4(weight, amax, method)):
        assert ours.codes.equal(expected.codes)
        assert ours.weight_scale.view(torch.uint8).equal(expected.weight_scale.view(torch.uint8))
        assert ours.weight_scale_2.equal(expected.weight_scale_2)
    assert backend.dequantize_nvfp4(out).equal(dequantize_nvfp4(expected))
    if method in (WeightMethod.four_over_six, WeightMethod.mse):
        assert measured.squared_error_of_max.equal(squared_error_of_max(weight, amax))
        _, measured = backend.pack_nvfp4(weight, amax, method)
    assert measured.squared_error_of_max.equal(measured.squared_error)


def test_reference_dequantizes_into_a_buffer_and_flushes(weight):
    backend = get_backend("reference")
    weight[..., 16:32] *= 2.0**-16
    packed = backend.quantize_nvfp4(weight, backend.tensor_amax(weight), WeightMethod.max)
    out = torch.zeros_like(weight)
    assert backend.dequantize_nvfp4(packed, torch.bfloat16, out) is out
    expected = dequantize_nvfp4(packed, torch.bfloat16)
    assert out.equal(expected)
    backend.zero_flushed(out, packed.weight_scale)
    kept = (packed.weight_scale.float() >= 2.0**-6).repeat_interleave(16, -1)
    assert not kept.all()
    assert kept.any()
    assert out.equal(expected.where(kept, 0.0))


def test_reference_stores_fp8(weight):
    backend = get_backend("reference")
    amax = backend.tensor_amax(weight)
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    packed = backend.pack_fp8(weight, amax, out)
    codes, weight_scale = quantize_fp8(weight, amax)
    assert packed.codes is out
    assert out.view(torch.uint8).equal(codes.view(torch.uint8))
    assert packed.weight_scale.equal(weight_scale)
    assert packed.squared_weight.equal(squared_weight(weight))
    errors = backend.fp8_squared_errors(weight, amax, (1.0, 1.5))
    assert errors.equal(fp8_squared_errors(weight, amax, (1.0, 1.5)))
    assert packed.squared_error.equal(errors[..., 0])
