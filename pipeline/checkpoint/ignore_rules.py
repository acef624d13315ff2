"""Which modules a server would leave unquantized because of an ignore list, as vLLM matches it.

In: `ignore` (config.json) or `exclude_modules` (hf_quant_config.json) and module names of the
checkpoint. Out: the modules or units that an entry hits.

How vLLM matches (model_executor/layers/quantization/modelopt.py `is_layer_excluded`,
utils/quant_utils.py `is_layer_skipped`), seen from the module that it asks about:

1. equal to an entry; for a fused `qkv_proj`: all of its parts are entries (some only: an error);
   for a name with `experts` in it: it is a substring of an entry that has `experts` in it;
2. an entry is a **substring** of it, so `backbone.layers.1` also hits layers 10 to 19;
3. an entry matches it as a glob (fnmatch).

Before that, vLLM renames: the entry `X*` becomes `X` and `X.*`, then the prefix `backbone`
becomes `model` and `embeddings` becomes `embed_tokens` (models/nemotron_h.py). An entry counts as
a hit here if it hits under either naming: SGLang and TensorRT-LLM match the checkpoint's names.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

_FUSED_PARTS = ("q_proj", "k_proj", "v_proj")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+")


def find_hits(entries: Iterable[str], modules: Sequence[str]) -> dict[str, str]:
    """Every entry that hits one of the modules, with the first module that it hits.

    Rules 2 and 3 over all modules (an entry that is equal is also a substring). One search over
    the joined names per entry keeps this fast for 50,000 modules.
    """
    hits: dict[str, str] = {}
    namings = [list(modules), [to_vllm_name(module) for module in modules]]
    texts = ["\n".join(names) for names in namings]
    for entry in entries:
        for names, text, form in zip(namings, texts, (_same, to_vllm_name), strict=True):
            for pattern in _expand(entry, form):
                index = _first_hit(pattern, names, text)
                if index is not None:
                    hits.setdefault(entry, modules[index])
    return hits


def units_of(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules as a server builds them: q/k/v as one `qkv_proj`, all experts as one."""
    units: dict[str, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        match = _EXPERT.fullmatch(module)
        unit = module
        if leaf in _FUSED_PARTS:
            unit = f"{parent}.qkv_proj"
        elif match:
            unit = match[1]
        units.setdefault(unit, []).append(module)
    return units


def is_excluded(unit: str, entries: Sequence[str]) -> bool:
    """Whether vLLM leaves a unit (from `units_of`) unquantized.

    Raises:
        ValueError: Some parts of a fused unit are entries and others are not; vLLM refuses to
            load that.
    """
    return any(
        _is_excluded(form(unit), [name for entry in entries for name in _expand(entry, form)])
        for form in (_same, to_vllm_name)
    )


def to_vllm_name(name: str) -> str:
    """The name inside vLLM's nemotron_h model of a name in the checkpoint."""
    if name.startswith("backbone"):
        name = "model" + name.removeprefix("backbone")
    return name.replace("A_log", "A").replace("embeddings", "embed_tokens")


def fused_groups(modules: Iterable[str]) -> Mapping[str, list[str]]:
    """The q/k/v projections of each attention layer, by the name of the fused unit."""
    return {
        unit: members for unit, members in units_of(modules).items() if unit.endswith(".qkv_proj")
    }


def _same(name: str) -> str:
    return name


def _expand(entry: str, form: object) -> list[str]:
    """The entry as it is under the checkpoint's naming, or as vLLM rewrites it."""
    if form is _same:
        return [entry]
    if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
        return [to_vllm_name(entry[:-1]), to_vllm_name(entry[:-1] + ".*")]
    return [to_vllm_name(entry)]


def _first_hit(pattern: str, names: Sequence[str], text: str) -> int | None:
    position = text.find(pattern)
    if position >= 0:
        return text.count("\n", 0, position)
    if any(sign in pattern for sign in "*?["):
        matches = re.compile(fnmatch.translate(pattern)).match
        return next((index for index, name in enumerate(names) if matches(name)), None)
    return None


def _is_excluded(unit: str, entries: Sequence[str]) -> bool:
    parent, _, leaf = unit.rpartition(".")
    if leaf == "qkv_proj":
        listed = [part for part in _FUSED_PARTS if f"{parent}.{part}" in entries]
        if len(listed) == len(_FUSED_PARTS):
            return True
        if listed:
            raise ValueError(f"{unit}: {', '.join(listed)} ignored, the others not")
    elif "experts" in unit and any(unit in entry for entry in entries if "experts" in entry):
        return True
    return any(entry in unit or fnmatch.fnmatchcase(unit, entry) for entry in entries)
