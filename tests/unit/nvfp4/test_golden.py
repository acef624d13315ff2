"""Model Optimizer 0.47's own bytes: sample tensors, and a whole exported model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.nvfp4 import PackedWeight, dequantize_weight, quantize_weight
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.nvfp4.reference import (
    fp8_squared_errors,
    input_scale,
    quantize_fp8,
    quantize_nvfp4,
    tensor_amax,
)

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ("gauss", "zero_blocks", "blog")
RECIPES = {"max": WeightMethod.max, "four_over_six": WeightMethod.four_over_six}
TIE_TENSORS, TIE_BLOCKS = 4, 22  # see test_four_over_six_export


@pytest.fixture(scope="module")
def vectors():
    with np.load(GOLDEN / "modelopt_0_47_nvfp4.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="module")
def source():
    return load_file(GOLDEN / "modelopt_tiny" / "source" / "model.safetensors")


@pytest.fixture(scope="module")
def default_export():
    return load_file(GOLDEN / "modelopt_tiny" / "nvfp4_default-kv_fp8" / "model.safetensors")


@pytest.fixture(scope="module")
def four_over_six_export():
    return load_file(GOLDEN / "modelopt_tiny" / "four_over_six" / "model.safetensors")


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def weight_of(vectors, case):
    return vectors[f"{case}/weight_bf16"].view(torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_sample_tensor(vectors, case, recipe):
    packed = quantize_weight(weight_of(vectors, case), RECIPES[recipe])
    assert torch.equal(packed.codes, vectors[f"{case}/{recipe}/weight"])
    assert torch.equal(bytes_of(packed.weight_scale), vectors[f"{case}/{recipe}/weight_scale"])
    assert torch.equal(packed.weight_scale_2, vectors[f"{case}/{recipe}/weight_scale_2"])


@pytest.mark.parametrize("case", CASES)
def test_sample_tensor_sweep(vectors, case):
    packed = quantize_weight(weight_of(vectors, case), "mse")
    assert torch.equal(packed.weight_scale_2, vectors[f"{case}/mse_sweep/weight_scale_2"])
    differs = bytes_of(packed.weight_scale) != vectors[f"{case}/mse_sweep/weight_scale"]
    assert differs.sum() <= differs.numel() // 1000  # two candidates may tie to the last bit
    ours = packed.codes.view(*differs.shape, 8)
    theirs = vectors[f"{case}/mse_sweep/weight"].view(*differs.shape, 8)
    assert torch.equal(ours[~differs], theirs[~differs])


@pytest.mark.parametrize("case", CASES)
def test_sample_tensor_fp8_and_input_scales(vectors, case):
    weight = weight_of(vectors, case)
    codes, weight_scale = quantize_fp8(weight, tensor_amax(weight))
    assert torch.equal(bytes_of(codes), vectors[f"{case}/fp8/weight"])
    assert torch.equal(weight_scale[None], vectors[f"{case}/fp8/weight_scale"])
    amax = vectors[f"{case}/input_bf16"].view(torch.bfloat16).abs().amax()
    assert input_scale(amax, Format.fp8) == vectors[f"{case}/fp8/input_scale"][0]
    for recipe in ("max", "four_over_six", "mse_sweep"):
        assert input_scale(amax, Format.nvfp4) == vectors[f"{case}/{recipe}/input_scale"]


def fused_amax(source, module):
    """q, k and v of a layer are served as one matrix and share one amax."""
    prefix, _, leaf = module.rpartition(".")
    siblings = ("q_proj", "k_proj", "v_proj") if leaf in ("q_proj", "k_proj", "v_proj") else (leaf,)
    return torch.stack([tensor_amax(source[f"{prefix}.{name}.weight"]) for name in siblings]).amax()


def test_nvfp4_default_export(source, default_export):
    modules = [key[: -len(".weight_scale_2")] for key in default_export if "weight_scale_2" in key]
    assert len(modules) == 70
    for module in modules:
        weight = source[f"{module}.weight"]
        packed = quantize_nvfp4(weight, fused_amax(source, module), WeightMethod.max_dynamic)
        assert torch.equal(packed.codes, default_export[f"{module}.weight"]), module
        scale = default_export[f"{module}.weight_scale"]
        assert torch.equal(bytes_of(packed.weight_scale), bytes_of(scale)), module
        assert torch.equal(packed.weight_scale_2, default_export[f"{module}.weight_scale_2"]), (
            module
        )


def block_errors(weight, packed):
    return (dequantize_weight(packed) - weight.float()).view(-1, 16).double().square().sum(-1)


def test_four_over_six_export_experts(source, four_over_six_export):
    """All but 22 blocks of 4 tensors are equal, and there our error is the smaller one.

    There a candidate's scale falls on an E4M3 rounding tie: Model Optimizer tries one neighbour
    and exports the other.
    """
    export = four_over_six_export
    modules = [key[: -len(".weight_scale_2")] for key in export if "weight_scale_2" in key]
    assert len(modules) == 48
    differing: dict[str, int] = {}
    for module in modules:
        weight = source[f"{module}.weight"]
        ours = quantize_weight(weight, "four_over_six")
        theirs = PackedWeight(*(export[f"{module}.{key}"] for key in (
            "weight", "weight_scale", "weight_scale_2")))  # fmt: skip
        assert torch.equal(ours.weight_scale_2, theirs.weight_scale_2), module
        differs = (bytes_of(ours.weight_scale) != bytes_of(theirs.weight_scale)).flatten()
        codes_differ = (ours.codes != theirs.codes).view(-1, 8).any(-1)
        assert not (codes_differ & ~differs).any(), module
        if differs.any():
            differing[module] = int(differs.sum())
            ours_error, theirs_error = block_errors(weight, ours), block_errors(weight, theirs)
            assert (ours_error[differs] < theirs_error[differs]).all(), module
    assert len(differing) == TIE_TENSORS
    assert sum(differing.values()) == TIE_BLOCKS


def test_four_over_six_export_fp8(source, four_over_six_export):
    modules = [
        key[: -len(".weight")]
        for key, tensor in four_over_six_export.items()
        if tensor.dtype == torch.float8_e4m3fn and key.endswith(".weight")
    ]
    assert len(modules) == 12
    chosen = []
    for module in modules:
        weight = source[f"{module}.weight"]
        amax = tensor_amax(weight)
        multipliers = (1.0, 1.5)
        best = int(fp8_squared_errors(weight, amax, multipliers).argmin())
        codes, weight_scale = quantize_fp8(weight, amax * multipliers[best])
        export = four_over_six_export
        assert torch.equal(bytes_of(codes), bytes_of(export[f"{module}.weight"])), module
        assert torch.equal(weight_scale, export[f"{module}.weight_scale"]), module
        chosen.append(multipliers[best])
    assert chosen.count(1.5) == 1
