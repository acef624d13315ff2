"""Reading a Nemotron-H config.json: layer types in either vocabulary, values, refusals.

In: the parsed config.json (NVIDIA's or transformers' spelling). Out: plain values for the fields
of `pipeline.architecture.Architecture`. Settings that change what the model computes and that the
forward pass does not implement are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from pipeline.checkpoint.source_files import MAX_TENSORS
from pipeline.checkpoint.strict_json import is_whole_number, shown
from pipeline.errors import ArchitectureError

MAX_LAYERS = 1024
"""Nemotron 3 Ultra has 108."""
MAX_SIZE = 1 << 24
"""Of anything that is counted: widths, heads, vocabulary. Ultra's largest is 131,072."""


class LayerType(StrEnum):
    """The four kinds of block that a Nemotron-H model is made of."""

    mamba = "mamba"
    attention = "attention"
    moe = "moe"
    mlp = "mlp"


_TYPE_OF_NAME = {
    "M": LayerType.mamba,
    "mamba": LayerType.mamba,
    "mamba2": LayerType.mamba,
    "linear_attention": LayerType.mamba,
    "*": LayerType.attention,
    "attention": LayerType.attention,
    "full_attention": LayerType.attention,
    "E": LayerType.moe,
    "moe": LayerType.moe,
    "-": LayerType.mlp,
    "mlp": LayerType.mlp,
}

# Older transformers spellings of NVIDIA's names (NemotronHConfig.__post_init__).
_OTHER_SPELLING = {
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "chunk_size": "mamba_chunk_size",
    "use_conv_bias": "mamba_conv_bias",
    "n_routed_experts": "num_local_experts",
    "layer_norm_epsilon": "norm_eps",
}


def read_values(
    config: Mapping[str, Any], fields: Iterable[dataclasses.Field[Any]]
) -> dict[str, Any]:
    """Values of the given dataclass fields, from config.json.

    Raises:
        ArchitectureError: Not a nemotron_h model, a missing or impossible value, or a setting
            that the forward pass does not implement.
    """
    model_type = config.get("model_type")
    if model_type != "nemotron_h":
        raise ArchitectureError(
            "config.json model_type",
            value=shown(model_type),
            rule="Layersweep converts the Nemotron-H family (model_type 'nemotron_h')",
            remedy="point checkpoint= at a nemotron_h checkpoint",
        )
    layers = _layer_types(config)
    values: dict[str, Any] = {"layers": layers, "mtp_layers": _mtp_layer_types(config)}
    required = _required(layers)
    for field in fields:
        if field.name not in values:
            values[field.name] = _read_field(config, field, required=required)
    _refuse_many_tensors((*layers, *values["mtp_layers"]), values.get("n_routed_experts", 0))
    _check_unsupported(config, layers)
    return values


_NEEDED = {
    LayerType.mamba: ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
    LayerType.attention: ("num_attention_heads", "num_key_value_heads", "head_dim"),
    LayerType.moe: ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    LayerType.mlp: ("intermediate_size",),
}


def _required(layers: tuple[LayerType, ...]) -> set[str]:
    needed = {"hidden_size", "vocab_size"}
    return needed.union(*(_NEEDED[kind] for kind in set(layers)))


def _read_field(
    config: Mapping[str, Any], field: dataclasses.Field[Any], *, required: set[str]
) -> Any:
    name = field.name
    key = name if name in config else _OTHER_SPELLING.get(name, name)
    value = config.get(key)
    if name == "moe_latent_size" and value == 0:
        return None
    if value is None:
        if name in required:
            raise ArchitectureError(
                f"config.json {name}",
                value="nothing",
                rule="the layers of this model need it",
                remedy=f"add {name} to config.json",
            )
        return field.default
    kind, most = str(field.type), ""
    if kind == "bool":
        valid = isinstance(value, bool)
    elif kind == "float":
        valid = is_whole_number(value) or isinstance(value, float)
        valid = valid and math.isfinite(value)
    else:
        valid = is_whole_number(value) and 0 <= value <= MAX_SIZE
        valid = valid and (value > 0 or name not in required)
        most = f", at most {MAX_SIZE}"
    if not valid:
        raise ArchitectureError(
            f"config.json {key}",
            value=shown(value),
            rule=f"must be a {'positive ' if name in required else ''}{kind.split(' ')[0]}{most}",
            remedy="restore the config.json that belongs to this checkpoint",
        )
    return value


def _types(names: Any, key: str) -> tuple[LayerType, ...]:
    known = "layer types are " + ", ".join(sorted(_TYPE_OF_NAME))
    is_listed = isinstance(names, str | list | tuple)
    if not is_listed or not len(names) <= MAX_LAYERS:
        raise ArchitectureError(
            f"config.json {key}",
            value=f"{len(names):,} layers" if is_listed else shown(names),
            rule=f"must be a text or a list of at most {MAX_LAYERS} layers; {known}",
            remedy="restore the config.json that belongs to this checkpoint",
        )
    unknown = [name for name in names if not isinstance(name, str) or name not in _TYPE_OF_NAME]
    if unknown:
        raise ArchitectureError(
            f"config.json {key}",
            value=shown(unknown[0]),
            rule=known,
            remedy="restore the config.json that belongs to this checkpoint",
        )
    return tuple(_TYPE_OF_NAME[name] for name in names)


def _layer_types(config: Mapping[str, Any]) -> tuple[LayerType, ...]:
    keys = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    found = {key: _types(config[key], key) for key in keys if config.get(key)}
    if not found:
        raise ArchitectureError(
            "config.json",
            value="neither layers_block_type nor hybrid_override_pattern",
            rule="one of them must say the type of every layer",
            remedy="restore the config.json that belongs to this checkpoint",
        )
    layers = next(iter(found.values()))
    if any(other != layers for other in found.values()):
        raise ArchitectureError(
            "config.json",
            value=" and ".join(f"{key} with {len(value)} layers" for key, value in found.items()),
            rule="they must describe the same layers",
            remedy="remove the wrong one",
        )
    count = config.get("num_hidden_layers")
    if count is not None and not (is_whole_number(count) and count == len(layers)):
        raise ArchitectureError(
            "config.json num_hidden_layers",
            value=shown(count),
            rule=f"{next(iter(found))} names {len(layers)} layers",
            remedy="restore the config.json that belongs to this checkpoint",
        )
    return layers


def _mtp_layer_types(config: Mapping[str, Any]) -> tuple[LayerType, ...]:
    for key in ("mtp_hybrid_override_pattern", "mtp_layers_block_type"):
        if config.get(key):
            return _types(config[key], key)
    return (LayerType.attention, LayerType.moe)


def _refuse_many_tensors(layers: tuple[LayerType, ...], experts: int) -> None:
    """Before anybody makes a list of them."""
    count = 2 * experts * layers.count(LayerType.moe)
    if count > MAX_TENSORS:
        raise ArchitectureError(
            "config.json n_routed_experts",
            value=f"{experts:,} in each of {layers.count(LayerType.moe)} layers",
            rule=f"that is {count:,} tensors, more than {MAX_TENSORS:,}",
            remedy="restore the config.json that belongs to this checkpoint",
        )


def _check_unsupported(config: Mapping[str, Any], layers: tuple[LayerType, ...]) -> None:
    """Refuses, by name, settings under which the forward pass would be another model's."""
    supported: dict[str, tuple[Any, ...]] = {
        "mlp_hidden_act": ("relu2", None),
        "mamba_hidden_act": ("silu", None),
        "sliding_window": (None,),
        "hidden_act": ("relu2", "silu", None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_router_pre_softmax": (False, None),
    }
    if LayerType.moe not in layers:
        supported = {key: supported[key] for key in list(supported)[:3]}
    for key, allowed in supported.items():
        if config.get(key) not in allowed:
            raise ArchitectureError(
                f"config.json {key}",
                value=shown(config[key]),
                rule=f"only {', '.join(repr(item) for item in allowed)} is supported",
                remedy="this model cannot be calibrated with this version of Layersweep",
            )
    limit = config.get("time_step_limit")
    if limit is not None and not _is_unlimited(limit):
        raise ArchitectureError(
            "config.json time_step_limit",
            value=shown(limit),
            rule="only (0, inf) is supported: servers and megatron-core do not clamp dt",
            remedy="this model cannot be calibrated with this version of Layersweep",
        )


def _is_unlimited(limit: Any) -> bool:
    if not isinstance(limit, (list, tuple)) or len(limit) != 2:
        return False
    low, high = limit
    if isinstance(low, bool) or isinstance(high, list):
        return False
    if isinstance(high, Mapping):  # transformers 5 writes {"__float__": "Infinity"}
        high = high.get("__float__")
    return bool(low == 0) and shown(high).strip("'").lower() in {"inf", "infinity"}
