"""`quantization_config` of config.json and `hf_quant_config.json`, as the loaders read them.

In: the format of every quantized projection, the modules left unquantized, and whether the KV
cache is FP8. Out: both JSON objects. With more than one format the mixed form lists one entry per
projection; with a single one the flat form says it once and `ignore` carries the exceptions.

The result is what `modelopt.torch.export.convert_hf_quant_config_format` (0.47) makes of the same
`hf_quant_config.json`; a test compares the two. It is not called here because importing
`modelopt.torch.export` takes 13 seconds and imports megatron-core.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.architecture import Architecture, Role, expected_tensors
from pipeline.checkpoint.ignore_rules import find_hits
from pipeline.errors import RecipeError
from pipeline.nvfp4.formats import BLOCK_SIZE, Format

# The version of Model Optimizer whose format this is; servers branch on the producer's name.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

# Model Optimizer's names (modelopt/torch/export/quant_utils.py, process_layer_quant_config).
ALGORITHMS: Mapping[tuple[Format, Format | None], str] = {
    (Format.nvfp4, Format.nvfp4): "NVFP4",
    (Format.nvfp4, None): "W4A16_NVFP4",
    (Format.fp8, Format.fp8): "FP8",
}
NVFP4_ALGORITHMS = frozenset({"NVFP4", "W4A16_NVFP4"})
MIXED = "MIXED_PRECISION"

_FP8_SPEC = {"dynamic": False, "num_bits": 8, "type": "float"}
_NVFP4_SPEC = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "NVFP4": {"input_activations": _NVFP4_SPEC, "weights": _NVFP4_SPEC},
    "W4A16_NVFP4": {"weights": _NVFP4_SPEC},
    "FP8": {"input_activations": _FP8_SPEC, "weights": _FP8_SPEC},
}

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+")
_LISTED_ROLES = frozenset(
    {
        Role.routed_expert,
        Role.shared_expert,
        Role.latent,
        Role.gate,
        Role.mamba_in,
        Role.mamba_out,
        Role.attention_qkv,
        Role.attention_out,
        Role.mlp,
        Role.embedding,
        Role.head,
    }
)


@dataclasses.dataclass(frozen=True)
class QuantizationConfigs:
    """Both JSON objects of one checkpoint.

    Attributes:
        quantization_config: For config.json.
        hf_quant_config: The whole of hf_quant_config.json.
    """

    quantization_config: dict[str, Any]
    hf_quant_config: dict[str, Any]


def build_quantization_configs(
    formats: Mapping[str, tuple[Format, Format | None]],
    unquantized: Iterable[str],
    *,
    kv_cache_fp8: bool,
) -> QuantizationConfigs:
    """Describes a checkpoint.

    Args:
        formats: Module name to weight and input format (None: weight-only), for every quantized
            projection; modules whose weight format is BF16 may be among them.
        unquantized: Module names that stay as they are (`unquantized_modules` lists them); a `*`
            at the end stands for a whole tree.
        kv_cache_fp8: Whether the checkpoint carries `k_scale` and `v_scale`.

    Raises:
        RecipeError: Nothing is quantized, formats that no loader knows, or an ignore entry that
            would exclude a quantized module.
    """
    algorithms = {
        module: algorithm_of(module, *pair)
        for module, pair in formats.items()
        if pair[0] is not Format.bf16
    }
    if not algorithms:
        raise RecipeError(
            "recipe",
            value="no quantized projection",
            rule="a quantized checkpoint has at least one",
            remedy="enable a weight quantizer",
        )
    ignore = summarize_ignored([*unquantized, *(set(formats) - set(algorithms))], algorithms)
    hits = find_hits(ignore, list(algorithms))
    if hits:
        entry, module = next(iter(hits.items()))
        raise RecipeError(
            f"ignore entry {entry}",
            value=f"also matches the quantized module {module}",
            rule="vLLM matches ignore entries by substring and glob",
            remedy="give both modules the same format",
        )
    used = sorted(set(algorithms.values()))
    kv_algorithm = "FP8" if kv_cache_fp8 else None
    quantization: dict[str, Any] = {
        "quant_algo": used[0] if len(used) == 1 else MIXED,
        "kv_cache_quant_algo": kv_algorithm,
    }
    if len(used) > 1:
        quantization["quantized_layers"] = {
            module: layer_entry(algorithm) for module, algorithm in algorithms.items()
        }
    elif used[0] in NVFP4_ALGORITHMS:
        quantization["group_size"] = BLOCK_SIZE
    quantization["exclude_modules"] = ignore
    hf_quant_config = {"producer": dict(PRODUCER), "quantization": quantization}
    return QuantizationConfigs(_to_quantization_config(hf_quant_config), hf_quant_config)


def algorithm_of(module: str, weight_format: Format, input_format: Format | None) -> str:
    """Model Optimizer's name of a pair of formats.

    Raises:
        RecipeError: No loader knows the pair.
    """
    inputs = None if input_format is Format.bf16 else input_format
    algorithm = ALGORITHMS.get((weight_format, inputs))
    if algorithm is None:
        raise RecipeError(
            module,
            value=f"{weight_format} weights with {inputs or 'bf16'} inputs",
            rule="servers load nvfp4 with nvfp4 inputs, nvfp4 weight-only, and fp8 with fp8 inputs",
            remedy="change the recipe's weight or input quantizer of this module",
        )
    return algorithm


def layer_entry(algorithm: str) -> dict[str, Any]:
    """The value of one `quantized_layers` entry."""
    if algorithm in NVFP4_ALGORITHMS:
        return {"quant_algo": algorithm, "group_size": BLOCK_SIZE}
    return {"quant_algo": algorithm}


def unquantized_modules(architecture: Architecture, quantized: Iterable[str]) -> list[str]:
    """The modules that a server might quantize and must not, in model order, `mtp*` last.

    These are Model Optimizer's: projections, router, conv1d, embedding and head; never norms.
    """
    taken = set(quantized)
    modules = [
        spec.module
        for spec in expected_tensors(architecture)
        if spec.name.endswith(".weight")
        and (spec.role in _LISTED_ROLES or spec.name.endswith("conv1d.weight"))
        and spec.module not in taken
    ]
    if architecture.tie_word_embeddings:
        modules.append("lm_head")
    if architecture.num_nextn_predict_layers:
        modules.append("mtp*")
    return modules


def summarize_ignored(unquantized: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Ignore entries without duplicates; the experts of a wholly unquantized layer become one.

    `backbone.layers.1.mixer.experts*` instead of 1,024 names: vLLM asks for `...experts` as a
    whole, and the glob cannot match another layer because it has the layer's full number.
    """
    partly = {match[1] for name in quantized if (match := _EXPERT.fullmatch(name))}
    entries: dict[str, None] = {}
    for name in unquantized:
        match = _EXPERT.fullmatch(name)
        entries[f"{match[1]}*" if match and match[1] not in partly else name] = None
    return list(entries)


def _to_quantization_config(hf_quant_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json form, keys in Model Optimizer's order."""
    quantization = hf_quant_config["quantization"]
    algorithm = quantization["quant_algo"]
    config: dict[str, Any] = {}
    if algorithm == MIXED:
        layers = quantization["quantized_layers"]
        config["config_groups"] = _mixed_groups(layers)
        config["quantized_layers"] = layers
    else:
        config["config_groups"] = {"group_0": _group(algorithm, ["Linear"])}
    config["ignore"] = quantization["exclude_modules"]
    config["quant_algo"] = algorithm
    if quantization["kv_cache_quant_algo"]:
        # A dict: vLLM reads only that form here.
        config["kv_cache_scheme"] = dict(_FP8_SPEC)
    config["producer"] = hf_quant_config["producer"]
    config["quant_method"] = "modelopt"
    return config


def _mixed_groups(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    members: dict[str, list[str]] = {}
    for module, entry in layers.items():
        members.setdefault(entry["quant_algo"], []).append(module)
    return {
        f"group_{number}": _group(algorithm, sorted(modules))
        for number, (algorithm, modules) in enumerate(members.items())
    }


def group_spec(algorithm: str) -> dict[str, Any]:
    """`weights` and `input_activations` of a `config_groups` entry."""
    return {key: dict(value) for key, value in _GROUPS[algorithm].items()}


def _group(algorithm: str, targets: Sequence[str]) -> dict[str, Any]:
    return {**group_spec(algorithm), "targets": list(targets)}
