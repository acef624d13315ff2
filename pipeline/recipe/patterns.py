"""Which entry of a recipe decides each quantizer, by Model Optimizer's own rules.

In: entries and modules. Out: a `Decision` per quantizer, and the patterns that fit none.

The rules (`modelopt/torch/quantization/conversion.py`, 0.47): entries apply in order; a pattern is
an fnmatch wildcard on the quantizer's full name; an entry with `cfg` replaces all attributes, one
without only switches on or off; `parent_class` restricts it to quantizers of such a module.

The names are those of transformers' `NemotronHForCausalLM`: `model.` instead of `backbone.`, and
routed experts fused into one module, whose quantizers are `experts.up_proj_input_quantizer` (one
for all experts) and `experts.up_proj_weight_quantizers.7`, which a pattern may also address as
`experts.up_proj_weight_quantizer`. An entry that fits none of these names is tried once more on
the checkpoint's own names (`backbone.`, one module per expert): those of NVIDIA's remote code.

An Ultra model has 150,000 quantizers, so they are matched as families: names that differ in their
numbers only. A pattern without digits, `?` or `[` cannot tell members of a family apart.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.architecture import Role
from pipeline.errors import RecipeError
from pipeline.recipe.records import Attributes, Entry, ModuleInfo

# Keys of Model Optimizer's QuantModuleRegistry that name modules of this model ...
_LINEAR, _CONV1D, _EMBEDDING = "nn.Linear", "nn.Conv1d", "nn.Embedding"
_ATTENTION, _EXPERTS = "NemotronHAttention", "hf.NemotronHExperts"
# ... and those that may stand in a recipe but name none.
_ABSENT_CLASSES = re.compile(
    r"nn\.((Adaptive)?AvgPool|MaxPool|BatchNorm|InstanceNorm)[123]d"
    r"|nn\.(Conv[23]d|ConvTranspose[123]d|GRU|LSTM|RNN|LayerNorm|LeakyReLU)"
)

_Naming = Callable[[str], tuple[str, ...]]
"""Transformers' names of a module's quantizer, by slot."""

_DIGITS = re.compile(r"\d+")
_TELLS_NUMBERS_APART = re.compile(r"[\d?\[]")
_LETTER_CHOICE = re.compile(r"\[[A-Za-z]+\]")  # as in '*[kv]_bmm_quantizer'
# The slots that Model Optimizer leaves off until an entry switches them on.
_OFF_AT_FIRST = {"output_quantizer"}
_LINEAR_SLOTS = ("weight_quantizer", "output_quantizer", "input_quantizer")
_BMM_SLOTS = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "p_bmm_quantizer")


@dataclass(frozen=True)
class Decision:
    """The final state of a quantizer.

    Attributes:
        enabled: Whether it is on.
        attributes: What it is configured to; empty: as Model Optimizer creates it.
        entry: The entry that decided its attributes, else the one that switched it on.
    """

    enabled: bool
    attributes: tuple[Attributes, ...] = ()
    entry: Entry | None = None


@dataclass
class Decisions:
    """Final states by (module, slot); the module of a `*_bmm_quantizer` is the mixer's name.

    Attributes:
        states: Decision by (module name in the checkpoint, slot), of the quantizers that are on.
        unmatched: Entries that fit no quantizer.
        weight_entries: Indices of the entries that fit a weight quantizer.
    """

    states: dict[tuple[str, str], Decision] = field(default_factory=dict)
    unmatched: list[Entry] = field(default_factory=list)
    weight_entries: set[int] = field(default_factory=set)

    def get(self, module: str, slot: str) -> Decision:
        """The state of one quantizer."""
        return self.states.get((module, slot), _OFF)


_OFF = Decision(False)


class _Member(NamedTuple):
    """A quantizer: its module, and its names under transformers' naming and the checkpoint's."""

    module: str
    names: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass
class _Family:
    """Quantizers whose names differ in numbers only.

    Attributes:
        slot: `weight_quantizer`, `input_quantizer`, ...
        parents: The `parent_class` that fits, under transformers' naming and the checkpoint's.
        members: The quantizers.
    """

    slot: str
    parents: tuple[str, str]
    members: list[_Member] = field(default_factory=list)


def decide(recipe: str, entries: Sequence[Entry], modules: Iterable[ModuleInfo]) -> Decisions:
    """Applies all entries to all quantizers of the modules.

    Raises:
        RecipeError: A `parent_class` that Model Optimizer does not know.
    """
    families = _families(modules)
    decisions = Decisions()
    hits: list[list[tuple[Entry, frozenset[int] | None]]] = [[] for _ in families]
    for entry in entries:
        _check_parent_class(recipe, entry)
        matched = _match(entry, families, naming=0) or _match(entry, families, naming=1)
        if not matched and not _is_about_mtp(entry.pattern):
            decisions.unmatched.append(entry)
        for index, members in matched.items():
            hits[index].append((entry, members))
            if families[index].slot == "weight_quantizer":
                decisions.weight_entries.add(entry.index)
    for family, family_hits in zip(families, hits, strict=True):
        at_first = Decision(family.slot not in _OFF_AT_FIRST)
        made: dict[tuple[bool, ...], Decision] = {}
        partial = [members for _, members in family_hits if members is not None]
        for index, (module, _) in enumerate(family.members):
            key = tuple([index in members for members in partial])
            if key not in made:
                made[key] = _apply(
                    at_first, [e for e, members in family_hits if not members or index in members]
                )
            if made[key].enabled:
                decisions.states[module, family.slot] = made[key]
    return decisions


def _apply(at_first: Decision, entries: Sequence[Entry]) -> Decision:
    enabled, attributes, author = at_first.enabled, at_first.attributes, at_first.entry
    for entry in entries:
        if entry.attributes:
            attributes, author = entry.attributes, entry
        elif entry.enable and not enabled and not attributes:
            author = entry
        enabled = entry.enable
    return Decision(enabled, attributes, author)


def _match(entry: Entry, families: list[_Family], naming: int) -> dict[int, frozenset[int] | None]:
    """Families that an entry fits, with the members it fits (None: all)."""
    fits = re.compile(fnmatch.translate(entry.pattern)).match
    tells_members_apart = _TELLS_NUMBERS_APART.search(_LETTER_CHOICE.sub("", entry.pattern))
    # A name without the pattern's longest literal part is not worth a regular expression.
    literals = re.split(r"[*?]", entry.pattern) if "[" not in entry.pattern else [""]
    literal = max(literals, key=len)
    cache: dict[str, bool] = {}

    def fits_any(names: tuple[str, ...]) -> bool:
        for name in names:
            if name not in cache:
                cache[name] = literal in name and fits(name) is not None
            if cache[name]:
                return True
        return False

    matched: dict[int, frozenset[int] | None] = {}
    for index, family in enumerate(families):
        if entry.parent_class not in (None, family.parents[naming]):
            continue
        if not tells_members_apart:
            if fits_any(family.members[0].names[naming]):
                matched[index] = None
            continue
        members = [i for i, member in enumerate(family.members) if fits_any(member.names[naming])]
        if members:
            everyone = len(members) == len(family.members)
            matched[index] = None if everyone else frozenset(members)
    return matched


def _families(modules: Iterable[ModuleInfo]) -> list[_Family]:
    families: dict[tuple[str, str], _Family] = {}

    def add(module: str, slots: Sequence[str], parents: tuple[str, str], naming: _Naming) -> None:
        without_numbers = _DIGITS.sub("0", module)
        for slot in slots:
            family = families.get((without_numbers, slot))
            if family is None:
                families[without_numbers, slot] = family = _Family(slot, parents)
            family.members.append(_Member(module, (naming(slot), (f"{module}.{slot}",))))

    attentions: set[str] = set()
    for module in modules:
        hub, parents = _transformers_name(module.name), _parent_classes(module.role)
        if module.expert is None:
            # The input quantizer of an embedding cannot be switched on.
            slots = _LINEAR_SLOTS[: 2 if module.role is Role.embedding else 3]
            add(module.name, slots, parents, _plain_names(hub))
        else:
            naming = _fused_names(module, hub)
            add(module.name, _LINEAR_SLOTS[1:], parents, naming)
            # The parent of a fused expert's weight quantizer is a ModuleList, of no class here.
            add(module.name, _LINEAR_SLOTS[:1], ("", parents[1]), naming)
        mixer = module.name.rpartition(".")[0]
        if module.role is Role.attention_qkv and mixer not in attentions:
            attentions.add(mixer)
            names = _plain_names(_transformers_name(mixer))
            add(mixer, _BMM_SLOTS, (_ATTENTION, _ATTENTION), names)
    return list(families.values())


def _transformers_name(module: str) -> str:
    if module in ("backbone.embedding", "backbone.embeddings"):
        return "model.embeddings"
    prefix, dot, rest = module.partition(".")
    return f"model{dot}{rest}" if prefix == "backbone" else module


def _plain_names(module: str) -> _Naming:
    return lambda slot: (f"{module}.{slot}",)


def _fused_names(module: ModuleInfo, hub: str) -> _Naming:
    prefix = hub.rpartition(".experts.")[0] + f".experts.{module.projection}_"

    def names(slot: str) -> tuple[str, ...]:
        if slot == "output_quantizer":
            return ()  # the fused module has none
        if slot == "weight_quantizer":
            return (f"{prefix}{slot}", f"{prefix}{slot}s.{module.expert}")
        return (prefix + slot,)

    return names


def _parent_classes(role: Role) -> tuple[str, str]:
    if role is Role.embedding:
        return _EMBEDDING, _EMBEDDING
    if role is Role.mamba_other:
        return _CONV1D, _CONV1D
    return (_EXPERTS if role is Role.routed_expert else _LINEAR), _LINEAR


def _check_parent_class(recipe: str, entry: Entry) -> None:
    name = entry.parent_class
    known = (_LINEAR, _CONV1D, _EMBEDDING, _ATTENTION, _EXPERTS)
    if name is not None and name not in known and not _ABSENT_CLASSES.fullmatch(name):
        raise RecipeError(
            f"recipe {recipe}, entry {entry.index} ({entry.pattern!r}), parent_class",
            value=name,
            rule="no module class that Model Optimizer registers for this model",
            remedy=f"use one of {', '.join(known)}, or leave it out",
        )


def _is_about_mtp(pattern: str) -> bool:
    """Whether a pattern speaks of `mtp.*`, which is in no model here and never quantized."""
    return pattern.lstrip("*").startswith("mtp")
