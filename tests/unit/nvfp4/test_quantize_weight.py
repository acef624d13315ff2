"""The library's two functions: what they return and what they refuse."""

import pytest
import torch

from pipeline.errors import ConfigError, NumericsError
from pipeline.nvfp4 import WeightMethod, dequantize_weight, quantize_weight


@pytest.fixture
def weight_NK():
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("method", [*WeightMethod, *(str(name) for name in WeightMethod)])
def test_record_and_way_back(weight_NK, method):
    record = quantize_weight(weight_NK, method=method)
    assert (record.codes.shape, record.codes.dtype) == ((8, 32), torch.uint8)
    assert (record.weight_scale.shape, record.weight_scale.dtype) == ((8, 4), torch.float8_e4m3fn)
    assert (record.weight_scale_2.shape, record.weight_scale_2.dtype) == ((), torch.float32)
    back = dequantize_weight(record)
    assert (back.shape, back.dtype) == ((8, 64), torch.float32)
    relative = (back - weight_NK.float()).norm() / weight_NK.float().norm()
    assert relative < 0.12
    assert torch.equal(dequantize_weight(record, torch.bfloat16), back.bfloat16())


def test_four_over_six_is_the_default(weight_NK):
    default = quantize_weight(weight_NK)
    assert torch.equal(default.codes, quantize_weight(weight_NK, "four_over_six").codes)


def test_unknown_method_and_backend_are_refused(weight_NK):
    with pytest.raises(
        ConfigError,
        match=r"method: found awq; supported: max, max_dynamic, four_over_six, mse\.",
    ):
        quantize_weight(weight_NK, "awq")
    with pytest.raises(ConfigError, match=r"backend: found cuda; supported: reference, triton\."):
        quantize_weight(weight_NK, backend="cuda")


def test_kernels_without_a_gpu_are_refused(weight_NK):
    message = r'backend: found triton with tensors on cpu; .*on a GPU.*backend="reference"'
    with pytest.raises(ConfigError, match=message):
        quantize_weight(weight_NK, backend="triton")
    with pytest.raises(ConfigError, match=message):
        dequantize_weight(quantize_weight(weight_NK), backend="triton")


def test_unfit_weights_are_refused(weight_NK):
    with pytest.raises(NumericsError, match=r"weight_NK: found shape \[8, 60\]"):
        quantize_weight(weight_NK[:, :60])
    with pytest.raises(NumericsError, match=r"weight_NK: found shape \[16\]"):
        quantize_weight(weight_NK[0, :16])
    with pytest.raises(NumericsError, match="weight_NK: found float16"):
        quantize_weight(weight_NK.half())
    weight_NK[3, 3] = torch.nan
    with pytest.raises(NumericsError, match="weight_NK: found NaN or Inf"):
        quantize_weight(weight_NK)
