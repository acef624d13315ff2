"""From a recipe and a model's modules to one format per projection.

In: a `Recipe` and the modules of `modules_of`. Out: a `Resolution`. Whatever the recipe asks for
and cannot be had is refused here, by the name of the entry and of the module.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence

from pipeline.architecture import Role
from pipeline.errors import RecipeError
from pipeline.recipe.formats import (
    SUPPORTED,
    QuantizerFormat,
    RefusedFormat,
    describe,
    kv_format,
    module_format,
    read_quantizer,
)
from pipeline.recipe.patterns import Decision, Decisions, decide
from pipeline.recipe.records import (
    Attributes,
    Entry,
    KVFormat,
    ModuleFormat,
    ModuleInfo,
    Recipe,
    Resolution,
    plain,
)


def resolve(recipe: Recipe, modules: Sequence[ModuleInfo]) -> Resolution:
    """Applies a recipe to a model.

    Raises:
        RecipeError: A format or pair of formats that is not supported, a quantizer that cannot be
            served, formats that differ within a fused group, an MoE layer or the KV cache, or an
            enabled weight format that ends on no tensor.
    """
    decisions = decide(recipe.name, recipe.entries, modules)
    resolver = _Resolver(recipe, decisions)
    resolver.refuse_what_stays_bf16(modules)
    linears = [module for module in modules if module.is_linear]
    formats = {module.name: resolver.format_of(module) for module in linears}
    _check_fused(recipe, linears, formats)
    _check_experts(recipe, linears, formats)
    kv = resolver.kv_formats(linears)
    _check_weight_formats_used(recipe, decisions, linears, kv)
    unmatched = list(dict.fromkeys(entry.pattern for entry in decisions.unmatched))
    return Resolution(formats, kv, unmatched)


class _Resolver:
    """Turns decisions into formats; each pair of decisions is read once."""

    def __init__(self, recipe: Recipe, decisions: Decisions) -> None:
        self._recipe, self._decisions = recipe, decisions
        self._formats: dict[tuple[int, int], ModuleFormat] = {}

    def refuse_what_stays_bf16(self, modules: Sequence[ModuleInfo]) -> None:
        """Refuses enabled quantizers that have no place in the checkpoint."""
        kept = {
            Role.embedding: "the embedding keeps the source's bytes",
            Role.head: "lm_head keeps the source's bytes",
            Role.mamba_other: "conv1d keeps the source's bytes",
        }
        roles = {module.name: module.role for module in modules}
        for (module, slot), decision in self._decisions.states.items():
            rule = kept.get(roles.get(module, Role.bias))
            if slot == "output_quantizer":
                rule = "output quantizers have no place in the checkpoint"
            elif slot in ("q_bmm_quantizer", "p_bmm_quantizer"):
                rule = "only keys and values (k_bmm, v_bmm) are stored quantized"
            if rule is not None:
                asked = _asked(decision)
                remedy = f"end quant_cfg with {{quantizer_name: '*{_tail(module, slot)}', "
                raise _error(
                    self._recipe,
                    decision.entry,
                    f"{asked} for {module}.{slot}",
                    rule,
                    remedy + "enable: false}",
                )

    def format_of(self, module: ModuleInfo) -> ModuleFormat:
        weight = self._decisions.get(module.name, "weight_quantizer")
        inputs = self._decisions.get(module.name, "input_quantizer")
        key = (id(weight), id(inputs))
        if key not in self._formats:
            try:
                self._formats[key] = module_format(
                    self._read(weight, f"{module.name}.weight_quantizer"),
                    self._read(inputs, f"{module.name}.input_quantizer"),
                    self._recipe.algorithm,
                )
            except RefusedFormat as refused:
                entry = (weight if weight.enabled else inputs).entry
                raise _refused(self._recipe, entry, refused, module.name) from None
        return self._formats[key]

    def kv_formats(self, linears: Sequence[ModuleInfo]) -> dict[int, KVFormat]:
        """KV cache per attention layer; all layers share one `kv_cache_scheme`."""
        mixers = {
            module.layer: module.name.rpartition(".")[0]
            for module in linears
            if module.role is Role.attention_qkv and module.layer is not None
        }
        formats: dict[int, KVFormat | None] = {}
        for layer, mixer in mixers.items():
            keys = self._decisions.get(mixer, "k_bmm_quantizer")
            values = self._decisions.get(mixer, "v_bmm_quantizer")
            try:
                formats[layer] = kv_format(
                    self._read(keys, f"{mixer}.k_bmm_quantizer"),
                    self._read(values, f"{mixer}.v_bmm_quantizer"),
                )
            except RefusedFormat as refused:
                entry = (keys if keys.enabled else values).entry
                raise _refused(self._recipe, entry, refused, mixer) from None
        if len(set(formats.values())) > 1:
            plain_layers = [layer for layer, kv in formats.items() if kv is None]
            raise RecipeError(
                f"recipe {self._recipe.name}, KV cache",
                value=f"formats that differ between attention layers (BF16 in {plain_layers})",
                rule="servers read one kv_cache_scheme for the whole model",
                remedy="use '*[kv]_bmm_quantizer' without a layer number",
            )
        return {layer: kv for layer, kv in formats.items() if kv is not None}

    def _read(self, decision: Decision, quantizer: str) -> QuantizerFormat | None:
        if not decision.enabled:
            return None
        try:
            return read_quantizer(decision.attributes)
        except RefusedFormat as refused:
            raise _refused(self._recipe, decision.entry, refused, quantizer) from None


def _check_fused(
    recipe: Recipe, linears: Sequence[ModuleInfo], formats: dict[str, ModuleFormat]
) -> None:
    """q, k and v are one matrix to a server: one format, one weight scale, one input scale."""
    groups: dict[str, list[str]] = defaultdict(list)
    for module in linears:
        if module.role is Role.attention_qkv:
            groups[module.name.rpartition(".")[0]].append(module.name)
    for mixer, names in groups.items():
        if len({formats[name] for name in names}) > 1:
            found = ", ".join(
                f"{name.rpartition('.')[2]} {_short(formats[name])}" for name in names
            )
            raise RecipeError(
                f"recipe {recipe.name}, {mixer}",
                value=found,
                rule="servers fuse q_proj, k_proj and v_proj, so they must have one format",
                remedy="give all three the same entries ('*[qkv]_proj*')",
            )
        if len(formats[names[0]].fp8_multipliers) > 1:
            raise RecipeError(
                f"recipe {recipe.name}, {mixer}",
                value=f"FP8 q/k/v under algorithm {recipe.algorithm.describe()}",
                rule="Model Optimizer searches q, k and v one by one, servers need one scale",
                remedy="leave q, k and v in BF16, or use method max or fp8_scale_sweep: true",
            )


def _check_experts(
    recipe: Recipe, linears: Sequence[ModuleInfo], formats: dict[str, ModuleFormat]
) -> None:
    """VLLM gives all experts of a layer, up and down projections alike, one format."""
    layers: dict[int | None, dict[ModuleFormat, list[ModuleInfo]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for module in linears:
        if module.role is Role.routed_expert:
            layers[module.layer][formats[module.name]].append(module)
    for layer, members in layers.items():
        kinds: dict[str, list[ModuleInfo]] = defaultdict(list)
        for module_format_, group in members.items():
            kinds[_short(module_format_)] += group
        if len(kinds) > 1:
            parts = (f"{kind} for {_expert_list(group)}" for kind, group in kinds.items())
            raise RecipeError(
                f"recipe {recipe.name}, routed experts of layer {layer}",
                value="; ".join(parts),
                rule="all experts of a layer must have one format, up_proj and down_proj alike",
                remedy="use patterns that do not tell experts of a layer apart",
            )


def _expert_list(modules: Sequence[ModuleInfo]) -> str:
    names = sorted({module.projection for module in modules}, reverse=True)
    experts = sorted({module.expert for module in modules if module.expert is not None})
    shown = ", ".join(str(expert) for expert in experts[:8])
    more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
    return f"{'/'.join(names)} of experts {shown}{more}"


def _check_weight_formats_used(
    recipe: Recipe, decisions: Decisions, linears: Sequence[ModuleInfo], kv: dict[int, KVFormat]
) -> None:
    """Every weight format that the recipe enables must be on some tensor in the end.

    A dead pattern asks for weights if it names them, as in Model Optimizer's own check
    (`model_quant.py`, `_check_weight_quantization_took_effect`).
    """
    on_tensors: dict[int, tuple[Attributes, ...]] = {}
    for module in linears:
        decision = decisions.get(module.name, "weight_quantizer")
        if decision.enabled:
            on_tensors[id(decision.attributes)] = decision.attributes
    used = {_key(attributes) for attributes in on_tensors.values()}
    for entry in recipe.entries:
        if not (entry.enable and entry.attributes):
            continue
        asks_for_weights = (
            entry.index in decisions.weight_entries
            or "weight_quantizer" in entry.pattern
            or fnmatch.fnmatchcase("weight_quantizer", entry.pattern)
        )
        if asks_for_weights and _key(entry.attributes) not in used:
            raise _error(
                recipe,
                entry,
                f"{_names(entry.attributes)}, which ends on no tensor of this model",
                "an enabled weight format must be used, or the output is not what it says",
                "check the pattern against the module names, and the entries after it",
            )
    if not used and not kv:
        raise RecipeError(
            f"recipe {recipe.name}",
            value="no weight and no KV cache that it quantizes on this model",
            rule=SUPPORTED,
            remedy="check its patterns against the module names",
        )


def _key(attributes: tuple[Attributes, ...]) -> str:
    return repr([plain(quantizer) for quantizer in attributes])


def _names(attributes: tuple[Attributes, ...]) -> str:
    return ", then ".join(describe(quantizer) for quantizer in attributes)


def _short(module_format_: ModuleFormat) -> str:
    """Format, method and inputs in a few words."""
    if not module_format_.is_quantized:
        return "BF16"
    text = module_format_.weight_format.name.upper()
    if module_format_.weight_method is not None:
        text += f" {module_format_.weight_method.name}"
    if module_format_.input_format is None:
        return f"{text} weight-only"
    constant = module_format_.constant_input_amax
    return text if constant is None else f"{text} with input amax {constant:g}"


def _asked(decision: Decision) -> str:
    return (
        _names(decision.attributes) if decision.attributes else "INT8 (Model Optimizer's default)"
    )


def _tail(module: str, slot: str) -> str:
    return (
        slot
        if slot.endswith(("output_quantizer", "bmm_quantizer"))
        else (module.rpartition(".")[2] + "*")
    )


def _refused(
    recipe: Recipe, entry: Entry | None, refused: RefusedFormat, target: str
) -> RecipeError:
    return _error(
        recipe,
        entry,
        f"{refused.asked} for {target}",
        f"not supported; {SUPPORTED}",
        refused.remedy,
    )


def _error(
    recipe: Recipe, entry: Entry | None, value: str, rule: str, remedy: str = ""
) -> RecipeError:
    where = "" if entry is None else f", entry {entry.index} ({entry.pattern!r})"
    return RecipeError(f"recipe {recipe.name}{where}", value=value, rule=rule, remedy=remedy)
