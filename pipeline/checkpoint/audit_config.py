"""The audit of what a checkpoint says about itself: names, formats, ignore rules, fused groups.

In: config.json, hf_quant_config.json and the place of every tensor. Out: the algorithm that a
server would use for each projection (`Declared`), and everything in which the description is
broken, contradicts itself or contradicts what is stored.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.architecture import TensorSpec
from pipeline.checkpoint.ignore_rules import find_hits, fused_groups, is_excluded, units_of
from pipeline.checkpoint.quantization_config import (
    ALGORITHMS,
    MIXED,
    NVFP4_ALGORITHMS,
    group_spec,
)
from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.checkpoint.source_check import is_mtp

KNOWN_ALGORITHMS = frozenset(ALGORITHMS.values())
_BROKEN_NAME = re.compile(r"[\x00-\x1f]|pt_name_sentinel")


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the configs say.

    Attributes:
        algorithms: Model Optimizer's algorithm name per quantized projection.
        ignore: The ignore list.
        is_mixed: Whether `quantized_layers` lists the projections.
        kv_cache_fp8: Whether attention layers must carry `k_scale` and `v_scale`.
    """

    algorithms: dict[str, str]
    ignore: tuple[str, ...]
    is_mixed: bool
    kv_cache_fp8: bool


def check_names(quantization: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Names that an exporter broke: a NUL or another control character, `pt_name_sentinel`."""
    named = {
        "quantized_layers": list(quantization.get("quantized_layers") or {}),
        "ignore": list(quantization.get("ignore") or []),
        "config_groups targets": _targets(quantization),
        "tensors": list(tensors),
    }
    problems = []
    for where, names in named.items():
        broken = [name for name in names if _BROKEN_NAME.search(str(name))]
        if broken:
            problems.append(f"{len(broken)} broken names in {where}, the first {broken[0]!r}")
    return problems


def read_declared(
    quantization: Mapping[str, Any], specs: Sequence[TensorSpec]
) -> tuple[Declared, list[str]]:
    """Reads `quantization_config`, with names cleaned of what `check_names` reports."""
    problems: list[str] = []
    if quantization.get("quant_method") != "modelopt":
        problems.append(f"quant_method is {quantization.get('quant_method')!r}, not 'modelopt'")
    ignore = tuple(_clean(str(entry)) for entry in quantization.get("ignore") or [])
    if "ignore" not in quantization:
        problems.append("quantization_config has no ignore list")
    scheme = quantization.get("kv_cache_scheme")
    is_fp8 = isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) == (
        8,
        "float",
    )
    if scheme is not None and not is_fp8:
        problems.append(
            f"kv_cache_scheme is {scheme!r}; vLLM reads only "
            '{"dynamic": false, "num_bits": 8, "type": "float"}'
        )
    linears = [spec.module for spec in specs if spec.is_linear_weight]
    algorithm = quantization.get("quant_algo")
    is_mixed = algorithm == MIXED
    if is_mixed:
        algorithms = _mixed_algorithms(quantization, linears, problems)
    elif algorithm in KNOWN_ALGORITHMS:
        algorithms = _flat_algorithms(str(algorithm), linears, ignore, problems)
    else:
        algorithms = {}
        problems.append(f"quant_algo is {algorithm!r}; known: {sorted(KNOWN_ALGORITHMS)}, {MIXED}")
    return Declared(algorithms, ignore, is_mixed, is_fp8), problems


def check_hf_quant_config(
    hf_quant_config: Mapping[str, Any], quantization: Mapping[str, Any]
) -> list[str]:
    """Whether hf_quant_config.json says the same as config.json."""
    inner = hf_quant_config.get("quantization")
    if not isinstance(inner, dict):
        return ["hf_quant_config.json has no quantization"]
    kv_algorithm = "FP8" if isinstance(quantization.get("kv_cache_scheme"), dict) else None
    pairs = {
        "quant_algo": (inner.get("quant_algo"), quantization.get("quant_algo")),
        "quantized_layers": (
            inner.get("quantized_layers") or {},
            quantization.get("quantized_layers") or {},
        ),
        "exclude_modules / ignore": (
            set(inner.get("exclude_modules") or []),
            set(quantization.get("ignore") or []),
        ),
        "group_size": (inner.get("group_size", 16), 16),
        "kv_cache_quant_algo": (inner.get("kv_cache_quant_algo") or None, kv_algorithm),
    }
    return [
        f"{key} differs between hf_quant_config.json and config.json"
        for key, (one, other) in pairs.items()
        if one != other
    ]


def check_stored_formats(
    declared: Declared, specs: Sequence[TensorSpec], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """Projections whose stored weight is of another kind than the configs say."""
    problems = []
    for spec in specs:
        info = tensors.get(spec.name)
        if not spec.is_linear_weight or info is None:
            continue
        algorithm = declared.algorithms.get(spec.module)
        if _kind_of(algorithm) != _stored_kind(info):
            problems.append(
                f"{spec.module}: config says {algorithm or 'unquantized'}, stored is {info.dtype}"
            )
    return problems


def check_ignore(declared: Declared, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Ignore entries that hit a quantized module, and modules that lack the entry they need."""
    weights = {
        name.removesuffix(".weight"): info
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    quantized = [module for module, info in weights.items() if _stored_kind(info) != "float"]
    problems = [
        f"ignore entry {entry!r} also excludes the quantized {module} "
        "(vLLM matches by substring and glob)"
        for entry, module in find_hits(declared.ignore, quantized).items()
    ]
    problems += [
        f"{unit} is quantized, and the ignore list excludes it as vLLM asks for it"
        for unit in units_of(quantized)
        if _is_excluded(unit, declared.ignore)
    ]
    needed = [module for module in weights if is_mtp(module)]
    if not declared.is_mixed and "lm_head" in weights:
        needed.append("lm_head")
    for unit in units_of(needed):
        if not _is_excluded(unit, declared.ignore):
            problems.append(f"{unit} is not ignored: servers would read it as quantized")
    return problems


def check_experts(declared: Declared, specs: Sequence[TensorSpec]) -> list[str]:
    """MoE layers whose routed experts do not all have one format."""
    by_layer: dict[int, dict[str, list[str]]] = {}
    for spec in specs:
        if spec.is_routed_expert and spec.is_linear_weight and spec.layer is not None:
            algorithm = declared.algorithms.get(spec.module, "unquantized")
            by_layer.setdefault(spec.layer, {}).setdefault(algorithm, []).append(spec.module)
    return [
        f"layer {layer}: "
        + ", ".join(f"{len(names)} x {key} (e.g. {names[0]})" for key, names in kinds.items())
        for layer, kinds in by_layer.items()
        if len(kinds) > 1
    ]


def check_fused_formats(declared: Declared, specs: Sequence[TensorSpec]) -> list[str]:
    """Attention layers whose q/k/v differ in format; servers fuse the three."""
    problems = []
    linears = [spec.module for spec in specs if spec.is_linear_weight]
    for unit, members in fused_groups(linears).items():
        kinds = {name: declared.algorithms.get(name, "unquantized") for name in members}
        if len(set(kinds.values())) > 1:
            problems.append(f"{unit}: " + ", ".join(f"{k} {v}" for k, v in kinds.items()))
    return problems


def check_alignment(
    declared: Declared, specs: Sequence[TensorSpec], *, hopper: bool
) -> tuple[list[str], list[str]]:
    """NVFP4 projections whose input width a server cannot load, and notes about Hopper."""
    problems, uneven = [], []
    for spec in specs:
        if spec.is_linear_weight and declared.algorithms.get(spec.module) in NVFP4_ALGORITHMS:
            if spec.shape[1] % 16:
                problems.append(f"{spec.module}: in_features {spec.shape[1]} % 16 != 0")
            elif spec.shape[1] % 64:
                uneven.append(f"{spec.module}: in_features {spec.shape[1]} % 64 != 0")
    if not uneven or hopper:
        return problems + [f"{text} (Hopper needs 64)" for text in uneven], []
    note = f"{len(uneven)} NVFP4 projections cannot run on Hopper, the first {uneven[0]}"
    return problems, [note]


def check_groups(quantization: Mapping[str, Any], declared: Declared) -> list[str]:
    """Whether `config_groups` and the KV scheme describe the algorithms that are declared."""
    problems = []
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return ["config_groups is missing: loaders read the formats there"]
    for name, group in groups.items():
        if not isinstance(group, dict):
            problems.append(f"config_groups {name} is {group!r}")
            continue
        targets = [_clean(target) for target in group.get("targets") or []]
        members = targets if declared.is_mixed else list(declared.algorithms)
        wanted = {declared.algorithms.get(member) for member in members}
        said = {key: value for key, value in group.items() if key != "targets"}
        for algorithm in sorted(KNOWN_ALGORITHMS.intersection(wanted)):
            if said != group_spec(algorithm):
                problems.append(f"config_groups {name} does not describe {algorithm}: {said}")
    scheme = quantization.get("kv_cache_scheme")
    if isinstance(scheme, dict) and scheme.get("dynamic"):
        problems.append("kv_cache_scheme is dynamic, and the checkpoint carries static scales")
    size = quantization.get("group_size", 16)
    if size != 16:
        problems.append(f"group_size is {size!r}; NVFP4 has blocks of 16")
    return problems


def _mixed_algorithms(
    quantization: Mapping[str, Any], linears: list[str], problems: list[str]
) -> dict[str, str]:
    layers = quantization.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        problems.append(f"quant_algo is {MIXED} and quantized_layers is empty")
        return {}
    known = set(linears)
    algorithms: dict[str, str] = {}
    for name, entry in layers.items():
        module = _clean(name)
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else None
        members = (
            [module] if module in known else [m for m in linears if m.startswith(f"{module}.")]
        )
        if algorithm not in KNOWN_ALGORITHMS:
            problems.append(f"quantized_layers {module!r}: unknown quant_algo {algorithm!r}")
        elif algorithm in NVFP4_ALGORITHMS and entry.get("group_size") != 16:
            problems.append(f"quantized_layers {module!r}: group_size {entry.get('group_size')!r}")
        if not members:
            problems.append(f"quantized_layers {module!r} is no projection of this model")
        elif members != [module]:
            problems.append(
                f"quantized_layers {module!r} stands for {len(members)} projections; "
                "there must be one entry per projection"
            )
        algorithms |= dict.fromkeys(members, str(algorithm))
    listed = {_clean(name) for name in layers}
    targets = {_clean(name) for name in _targets(quantization)}
    if targets != listed:
        problems.append("config_groups targets are not those of quantized_layers")
    return algorithms


def _flat_algorithms(
    algorithm: str, linears: list[str], ignore: tuple[str, ...], problems: list[str]
) -> dict[str, str]:
    algorithms: dict[str, str] = {}
    for unit, members in units_of(linears).items():
        try:
            if not is_excluded(unit, ignore):
                algorithms |= dict.fromkeys(members, algorithm)
        except ValueError as problem:
            problems.append(f"ignore: {problem}; vLLM refuses that")
    return algorithms


def _is_excluded(unit: str, ignore: tuple[str, ...]) -> bool:
    try:
        return is_excluded(unit, ignore)
    except ValueError:
        return False


def _targets(quantization: Mapping[str, Any]) -> list[str]:
    groups = quantization.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else []
    return [name for group in values for name in group.get("targets") or []]


def _clean(name: str) -> str:
    return name.split("\x00")[0].rstrip(".")


def _kind_of(algorithm: str | None) -> str:
    if algorithm is None:
        return "float"
    return "nvfp4" if algorithm in NVFP4_ALGORITHMS else "fp8"


def _stored_kind(info: TensorInfo) -> str:
    return {"U8": "nvfp4", "F8_E4M3": "fp8"}.get(info.dtype, "float")
