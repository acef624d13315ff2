"""Every PTQ recipe that Model Optimizer ships: the same formats as `mtq.quantize`, or a refusal.

The oracle is a tiny random transformers model with one layer of each kind; calibration is skipped
(`algorithm: None`), so what is compared is the state of every quantizer.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture, expected_tensors
from pipeline.errors import RecipeError
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.recipe import (
    KVFormat,
    ModuleFormat,
    library_names,
    load_recipe,
    modules_of,
    preset_names,
    resolve,
)

PRESETS = Path(__file__).parents[3] / "conf" / "recipe"

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 64,
    "hidden_size": 32,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "mamba_num_heads": 2,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 16,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "intermediate_size": 32,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_latent_size": 16,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}

NO_TENSOR = "ends on no tensor of this model"
REFUSED = {
    "general/ptq/int4_blockwise_weight_only": "INT4 in blocks of 128",
    "general/ptq/mxfp4_mlp_weight_only": "no calibration",
    "general/ptq/nvfp4_act_headroom-kv_fp8_cast": "nvfp4_act_headroom",
    "general/ptq/nvfp4_default-kv_none-gptq": "gptq",
    "general/ptq/nvfp4_default-kv_nvfp4_cast": "NVFP4 (amax 448) KV cache",
    "general/ptq/nvfp4_mlp_weight_only": "NVFP4 in blocks of 32",
    "general/qad/nvfp4_dual_lsq-mse_init-fp8_kv": "lsq",
    "general/qad/nvfp4_lsq-mse_init-fp8_kv": "lsq",
    "huggingface/gemma/ptq/int8_sq-kv_fp8_cast": "smoothquant",
    "huggingface/gemma/ptq/w4a8_awq-kv_fp8_cast": "awq_lite",
    "huggingface/gemma4/ptq/w4a8_awq-kv_fp8_cast": "awq_lite",
    "huggingface/minimax_m3_vl/ptq/mxfp8_nvfp4_experts": "MXFP8",
    "huggingface/minimax_m3_vl/ptq/nvfp4_experts_only": NO_TENSOR,
    "huggingface/mpt/ptq/w4a8_awq-kv_fp8_cast": "awq_lite",
    "huggingface/nemotron_llama/ptq/fp8_output_quant_proj": "output quantizers",
    "huggingface/nemotron_llama/ptq/nvfp4_output_quant_proj": "output quantizers",
    "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast": "lm_head.weight_quantizer",
    "huggingface/qwen3_5/ptq/w4a16_nvfp4_mse-fp8_attn-kv_fp8_cast": "lm_head.weight_quantizer",
    "huggingface/qwen3_5_moe/ptq/nvfp4_experts_mse-fp8_rest-kv_fp8": NO_TENSOR,
    "huggingface/qwen3_5_moe/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast": "lm_head.weight_quantizer",
    "huggingface/qwen3_5_moe/ptq/w4a16_nvfp4_mse-fp8_attn-kv_fp8_cast": "lm_head.weight_quantizer",
    "huggingface/step3p7/ptq/nvfp4_experts_only-kv_fp8_cast": NO_TENSOR,
    "huggingface/step3p7/ptq/nvfp4_mlp_only-kv_fp8": NO_TENSOR,
    "huggingface/vit/ptq/fp8": "backbone.embeddings.weight_quantizer",
    "models/deepseek-ai/DeepSeek-V4-Pro-0813/ptq/nvfp4_experts_only": NO_TENSOR,
    "models/mistralai/Mistral-Medium-3.5-128B/ptq/nvfp4-max-calib": NO_TENSOR,
    "models/moonshotai/Kimi-K3/ptq/nvfp4_experts-fp8_pb_attention": NO_TENSOR,
    "models/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16/ptq/nvfp4_w4a16": "backbone.embeddings",
    "models/nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16/ptq/w4a16_nvfp4_4o6": (
        "lm_head.weight_quantizer"
    ),
    "models/stepfun-ai/Step-3.5-Flash/ptq/nvfp4-mlp-only": NO_TENSOR,
}


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**CONFIG))


def modules() -> list[Any]:
    return modules_of(expected_tensors(Architecture.from_hf_config(CONFIG)))


def quantized(model: Any, name: str, entries: Any = None) -> Any:
    """The model after `mtq.quantize` with a recipe's own quant_cfg, uncalibrated."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe as load

    path = PRESETS / f"{name}.yaml"
    if entries is None:
        entries = load(path if path.is_file() else name).quantize.quant_cfg
    return mtq.quantize(copy.deepcopy(model), {"quant_cfg": entries, "algorithm": None})


def read_format(weight: Any, inputs: Any, algorithm: Any) -> ModuleFormat:
    """The format by Model Optimizer's own properties of its quantizers."""
    if not weight.is_enabled:
        assert not inputs.is_enabled
        return ModuleFormat(Format.bf16)
    method = None
    if not weight.is_fp8:
        assert weight.block_sizes[-1] == 16
        assert weight.is_nvfp4_static != weight.is_nvfp4_dynamic
        if weight.is_nvfp4_dynamic:
            method = WeightMethod.max_dynamic
        elif weight.block_sizes.get("four_over_six"):
            method = WeightMethod.four_over_six
        else:
            method = WeightMethod.mse if algorithm.fp8_scale_sweep else WeightMethod.max
    input_format = None
    if inputs.is_enabled:
        assert inputs.is_fp8 or (inputs.is_nvfp4_dynamic and inputs.block_sizes[-1] == 16)
        input_format = Format.fp8 if inputs.is_fp8 else Format.nvfp4
    return ModuleFormat(
        Format.fp8 if weight.is_fp8 else Format.nvfp4,
        method,
        algorithm.multipliers if weight.is_fp8 else (),
        input_format,
        inputs._constant_amax if inputs.is_enabled else None,
    )


def formats_of(model: Any, algorithm: Any) -> tuple[dict[str, ModuleFormat], dict[int, KVFormat]]:
    formats, kv = {}, {}
    for name, module in model.named_modules():
        name = name.replace("model.", "backbone.", 1)
        if hasattr(module, "up_proj_weight_quantizers"):
            for part in ("up_proj", "down_proj"):
                inputs = getattr(module, f"{part}_input_quantizer")
                for expert, weight in enumerate(getattr(module, f"{part}_weight_quantizers")):
                    expected = read_format(weight, inputs, algorithm)
                    formats[f"{name}.{expert}.{part}"] = expected
        elif hasattr(module, "k_bmm_quantizer"):
            keys, values = module.k_bmm_quantizer, module.v_bmm_quantizer
            assert keys.is_enabled == values.is_enabled
            if keys.is_enabled:
                assert keys.is_fp8
                kv[int(name.split(".")[2])] = KVFormat(448.0 if keys._use_constant_amax else None)
        elif hasattr(module, "weight_quantizer"):
            if name.endswith(("conv1d", "embeddings", "lm_head")):
                assert not module.weight_quantizer.is_enabled
                assert not module.input_quantizer.is_enabled
            else:
                formats[name] = read_format(
                    module.weight_quantizer, module.input_quantizer, algorithm
                )
    return formats, kv


def test_every_shipped_recipe_is_read_or_refused_by_name(model: Any) -> None:
    names = library_names()
    assert len(names) >= 54
    assert set(REFUSED) <= set(names)
    for name in names:
        if name in REFUSED:
            with pytest.raises(RecipeError) as caught:
                resolve(load_recipe(name, PRESETS), modules())
            assert name in str(caught.value)
            assert REFUSED[name] in str(caught.value)
            continue
        recipe = load_recipe(name, PRESETS)
        resolution = resolve(recipe, modules())
        formats, kv = formats_of(quantized(model, name), recipe.algorithm)
        assert resolution.formats == formats, name
        assert resolution.kv == kv, name


def test_presets_are_what_model_optimizer_makes_of_them(model: Any) -> None:
    for name in preset_names(PRESETS):
        recipe = load_recipe(name, PRESETS)
        resolution = resolve(recipe, modules())
        assert (resolution.formats, resolution.kv) == formats_of(
            quantized(model, name), recipe.algorithm
        ), name
        assert set(resolution.unmatched_patterns) <= {
            f"*.layers.{layer}.mixer.experts.*" for layer in (3, 5, 8, 101, 103, 105, 107)
        }


def test_the_flagship_preset_is_the_published_recipe() -> None:
    published = load_recipe(
        "models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6", PRESETS
    )
    preset = load_recipe("nvfp4_four_over_six", PRESETS)
    assert preset.algorithm == published.algorithm
    expected, found = resolve(published, modules()), resolve(preset, modules())
    assert (found.formats, found.kv) == (expected.formats, expected.kv)
    assert expected.unmatched_patterns == [
        "*mlp.experts*weight_quantizer",
        "*mlp.experts*input_quantizer",
        "*mlp.shared_experts*weight_quantizer",
        "*mlp.shared_experts*input_quantizer",
    ]


FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
CASES: dict[str, list[tuple[Any, ...]]] = {
    "the last entry replaces all attributes": [
        ("*mixer*weight_quantizer", NVFP4),
        ("*mixer*input_quantizer", NVFP4),
        ("*experts*weight_quantizer", FP8),
        ("*experts*input_quantizer", FP8),
        ("*conv1d*", False),
    ],
    "a layer number": [
        ("*experts*", FP8),
        ("*output_quantizer", False),
        ("*.layers.1.*", False),
    ],
    "switched off and on again": [
        ("*up_proj*", FP8),
        ("*down_proj*", FP8),
        ("*", False),
        ("*layers.[14]*_proj_weight_quantizer", True),
        ("*layers.?.mixer.experts*input_quantizer", True),
        ("*layers.[!3].mixer.shared*weight_quantizer", True),
        ("*mixer.shared_experts.up_proj.input_quantizer", True),
        ("*mixer.shared_experts.down_*.input_quantizer", True),
    ],
    "expert numbers": [
        ("*.experts.*weight_quantizers.[0-9]", FP8),
        ("*.experts.*weight_quantizers.1?", FP8),
        ("*experts.*_proj_input_quantizer", FP8),
    ],
    "parent_class nn.Linear leaves the fused experts out": [
        ("*", FP8, "nn.Linear"),
        ("*output_quantizer", False),
        ("lm_head*", False),
    ],
    "parent_class of the fused experts holds their input quantizers only": [
        ("*experts*", FP8),
        ("*output_quantizer", False),
        ("*", False, "hf.NemotronHExperts"),
        ("*experts.*_proj_weight_quantizers.*", False),
        ("*", False, "nn.BatchNorm1d"),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_pattern_rules_are_model_optimizers(model: Any, tmp_path: Path, case: str) -> None:
    cfg: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for pattern, what, *parent in CASES[case]:
        entry = {"enable": what} if isinstance(what, bool) else {"cfg": what}
        cfg.append({"quantizer_name": pattern} | entry)
        if parent:
            cfg[-1]["parent_class"] = parent[0]
    recipe = load_recipe(write_recipe(tmp_path, cfg), PRESETS)
    resolution = resolve(recipe, modules())
    oracle = formats_of(quantized(model, "", cfg), recipe.algorithm)
    assert (resolution.formats, resolution.kv) == oracle
    assert len(set(resolution.formats.values())) == 2


def write_recipe(directory: Path, cfg: list[dict[str, Any]], algorithm: Any = "max") -> Path:
    import yaml

    path = directory / "recipe.yaml"
    content = {
        "metadata": {"recipe_type": "ptq"},
        "quantize": {"algorithm": algorithm, "quant_cfg": in_yaml(cfg)},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def in_yaml(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_yaml(item) for key, item in value.items()}
    if isinstance(value, list):
        return [in_yaml(item) for item in value]
    return {(4, 3): "e4m3", (2, 1): "e2m1"}[value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    "options",
    [
        {"start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5},
        {"start_multiplier": 0.5, "stop_multiplier": 1.25, "step_size": 0.1},
        {},
    ],
)
def test_multipliers_choose_the_amax_that_mse_calibration_chooses(
    tmp_path: Path, options: dict[str, float]
) -> None:
    import modelopt.torch.quantization as mtq

    from pipeline.nvfp4.reference import fp8_squared_errors

    cfg = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight*", "cfg": FP8}]
    algorithm = {"method": "mse", **options}
    recipe = load_recipe(write_recipe(tmp_path, cfg, algorithm), PRESETS)
    multipliers = torch.tensor(recipe.algorithm.multipliers)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(6)))
    for layer in model:  # in fp32, else Model Optimizer rounds the chosen amax to bf16
        layer.weight.data = layer.weight.data.bfloat16().float()
    weights = [layer.weight.detach().clone() for layer in model]
    model = mtq.quantize(model, {"quant_cfg": cfg, "algorithm": algorithm})
    for layer, weight in zip(model, weights, strict=True):
        amax = weight.float().abs().amax()
        errors = fp8_squared_errors(weight, amax, recipe.algorithm.multipliers)
        chosen = amax * multipliers[errors.argmin()]
        assert math.isclose(layer.weight_quantizer.amax.item(), chosen.item(), rel_tol=1e-7)


def test_the_sweep_leaves_fp8_weights_at_their_amax(tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq

    cfg = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight*", "cfg": FP8}]
    algorithm = {"method": "mse", "fp8_scale_sweep": True}
    assert load_recipe(write_recipe(tmp_path, cfg, algorithm), PRESETS).algorithm.multipliers == ()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    weight = model[0].weight.detach().clone()
    model = mtq.quantize(model, {"quant_cfg": cfg, "algorithm": algorithm})
    assert model[0].weight_quantizer.amax.item() == weight.abs().amax().item()
