"""Model Optimizer as the oracle, on the CPU: its NVFP4 tensor, and its FP8 multiplier search."""

import pytest
import torch

from pipeline.nvfp4 import WeightMethod, dequantize_weight, quantize_weight
from pipeline.nvfp4.reference import fp8_squared_errors, fp8_weight_scale, tensor_amax

MULTIPLIERS = (1.0, 1.5)


def gaussian(shape, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", WeightMethod)
def test_nvfp4_qtensor_dequantizes_to_our_values(method, dtype):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = gaussian((48, 128), 3)
    weight[0] = 0  # zero blocks
    weight[1] *= 1e-6  # scales at the bottom of E4M3
    packed = quantize_weight(weight, method)
    theirs = NVFP4QTensor(weight.shape, dtype, packed.codes).dequantize(
        dtype=torch.float32,
        scale=packed.weight_scale,
        double_scale=packed.weight_scale_2,
        block_sizes={-1: 16},
    )
    ours = dequantize_weight(packed, dtype)
    assert torch.equal(ours.view(torch.uint8), theirs.to(dtype).view(torch.uint8))


def test_nvfp4_qtensor_packs_max_dynamic_as_we_do():
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = gaussian((64, 256), 4)
    packed = quantize_weight(weight, "max_dynamic")
    theirs, scale, _ = NVFP4QTensor.quantize(
        weight.clone(), 16, weights_scaling_factor_2=packed.weight_scale_2
    )
    assert torch.equal(packed.codes, theirs._quantized_data)
    assert torch.equal(packed.weight_scale.view(torch.uint8), scale.view(torch.uint8))


def test_fp8_multipliers_are_those_of_model_optimizer():
    import modelopt.torch.quantization as mtq

    weights = [gaussian((96, 128), seed) for seed in range(24)]
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 96, bias=False) for _ in weights))
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight.float()
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
        ],
        "algorithm": {
            "method": "mse",
            "start_multiplier": 1.0,
            "stop_multiplier": 1.5,
            "step_size": 0.5,
        },
    }
    mtq.quantize(model, config, lambda _: None)
    chosen = []
    for layer, weight in zip(model, weights, strict=True):
        amax = tensor_amax(weight)
        best = MULTIPLIERS[int(fp8_squared_errors(weight, amax, MULTIPLIERS).argmin())]
        assert layer.weight_quantizer.amax.item() == (amax * best).item()
        assert fp8_weight_scale(amax * best) > 0
        chosen.append(best)
    assert set(chosen) == set(MULTIPLIERS)  # otherwise this proves nothing
