import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pipeline.architecture import Architecture
from pipeline.checkpoint.quantization_config import (
    build_quantization_configs,
    summarize_ignored,
    unquantized_modules,
)
from pipeline.errors import RecipeError
from pipeline.nvfp4.formats import Format
from tests.unit.checkpoint.tiny import FP8, NVFP4, W4A16, mixed_formats, tiny_config

UP = "backbone.layers.1.mixer.experts.0.up_proj"
IN = "backbone.layers.0.mixer.in_proj"


def convert(hf_quant_config: dict[str, Any]) -> dict[str, Any]:
    """Model Optimizer's converter, loaded alone: its package takes 13 s to import."""
    root = importlib.util.find_spec("modelopt")
    assert root is not None
    assert root.submodule_search_locations is not None
    path = Path(root.submodule_search_locations[0], "torch/export/convert_hf_config.py")
    spec = importlib.util.spec_from_file_location("convert_hf_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    converted: dict[str, Any] = module.convert_hf_quant_config_format(hf_quant_config)
    return converted


@pytest.mark.parametrize("kv", [True, False])
@pytest.mark.parametrize(
    "formats",
    [{UP: NVFP4, IN: FP8}, {UP: NVFP4}, {UP: W4A16}, {IN: FP8}, {UP: W4A16, IN: NVFP4}],
)
def test_equals_the_converter_of_model_optimizer(formats: dict[str, Any], kv: bool) -> None:
    built = build_quantization_configs(formats, ["lm_head", "mtp*"], kv_cache_fp8=kv)
    assert built.quantization_config == convert(built.hf_quant_config)
    assert list(built.quantization_config) == list(convert(built.hf_quant_config))


def test_mixed_form() -> None:
    built = build_quantization_configs({UP: NVFP4, IN: FP8}, ["lm_head"], kv_cache_fp8=True)
    config = built.quantization_config
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quant_method"] == "modelopt"
    assert config["quantized_layers"] == {
        UP: {"quant_algo": "NVFP4", "group_size": 16},
        IN: {"quant_algo": "FP8"},
    }
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert config["ignore"] == ["lm_head"]
    quantization = built.hf_quant_config["quantization"]
    assert quantization["kv_cache_quant_algo"] == "FP8"
    assert quantization["exclude_modules"] == ["lm_head"]


def test_flat_form() -> None:
    built = build_quantization_configs({UP: W4A16}, [IN], kv_cache_fp8=False)
    config = built.quantization_config
    assert config["quant_algo"] == "W4A16_NVFP4"
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "input_activations" not in config["config_groups"]["group_0"]
    assert "quantized_layers" not in config
    assert "kv_cache_scheme" not in config
    assert built.hf_quant_config["quantization"]["group_size"] == 16


@pytest.mark.parametrize(
    "pair", [(Format.fp8, None), (Format.nvfp4, Format.fp8), (Format.fp8, Format.nvfp4)]
)
def test_formats_that_no_server_loads(pair: tuple[Format, Format | None]) -> None:
    with pytest.raises(RecipeError, match=r"in_proj: found .* weights with .* inputs; servers"):
        build_quantization_configs({IN: pair}, [], kv_cache_fp8=False)


def test_nothing_quantized() -> None:
    with pytest.raises(RecipeError, match="no quantized projection"):
        build_quantization_configs({IN: (Format.bf16, None)}, [], kv_cache_fp8=False)


def test_entry_that_would_exclude_a_quantized_module() -> None:
    formats = {"backbone.layers.10.mixer.in_proj": FP8}
    with pytest.raises(RecipeError, match=r"ignore entry backbone.layers.1: found also matches"):
        build_quantization_configs(formats, ["backbone.layers.1"], kv_cache_fp8=False)


def test_bf16_modules_among_the_formats_are_ignored() -> None:
    formats = {UP: NVFP4, IN: (Format.bf16, None)}
    config = build_quantization_configs(formats, [], kv_cache_fp8=False).quantization_config
    assert config["ignore"] == [IN]


def test_unquantized_modules_of_a_model() -> None:
    architecture = Architecture.from_hf_config(tiny_config())
    formats = mixed_formats(architecture)
    names = unquantized_modules(architecture, formats)
    assert names[0] == "backbone.embeddings"
    assert names[-2:] == ["lm_head", "mtp*"]
    for part in ("conv1d", "gate", "fc1_latent_proj", "o_proj"):
        assert any(name.endswith(part) for name in names)
    assert not any("norm" in name for name in names)
    assert not set(names) & set(formats)
    tied = Architecture.from_hf_config(tiny_config(tie_word_embeddings=True))
    assert "lm_head" in unquantized_modules(tied, formats)


def test_experts_of_an_unquantized_layer_become_one_entry() -> None:
    experts = [f"backbone.layers.1.mixer.experts.{n}.up_proj" for n in range(3)]
    assert summarize_ignored([*experts, IN], []) == ["backbone.layers.1.mixer.experts*", IN]
    assert summarize_ignored(experts[1:], experts[:1]) == experts[1:]
