"""Records of the recipe package: what a recipe says, and what it comes to on one model.

In: nothing. Out: `Recipe` (entries and algorithm as Model Optimizer reads them), `ModuleInfo` (a
module that Model Optimizer would wrap) and `Resolution` (one format per projection).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.architecture import LINEAR_ROLES, Role
from pipeline.nvfp4.formats import Format, WeightMethod

Attributes = Mapping[str, Any]
"""Model Optimizer's quantizer attributes, reduced to those that differ from its defaults."""


class NamedTensor(Protocol):
    """What `modules_of` reads of a tensor; `pipeline.architecture.TensorSpec` has it."""

    @property
    def name(self) -> str:
        """Full Hugging Face name."""

    @property
    def role(self) -> Role:
        """What the tensor is for."""

    @property
    def layer(self) -> int | None:
        """Index of its layer, or None outside the layers."""


@dataclass(frozen=True)
class ModuleInfo:
    """A module that Model Optimizer would give quantizers.

    Attributes:
        name: Module name in the checkpoint, e.g. `backbone.layers.1.mixer.experts.0.up_proj`.
        role: Role of its weight; `mamba_other` is a conv1d.
        layer: Index of its layer, or None outside the layers.
        expert: Index of the routed expert, or None.
    """

    name: str
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def projection(self) -> str:
        """Last part of the name: `up_proj`, `in_proj`, `q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def is_linear(self) -> bool:
        """Whether it is a projection inside a layer, which a recipe may quantize."""
        return self.role in LINEAR_ROLES


@dataclass(frozen=True)
class ModuleFormat:
    """The format of one projection.

    Attributes:
        weight_format: Format of the stored weight.
        weight_method: How NVFP4 block scales are chosen; None for other formats.
        fp8_multipliers: Candidates by which the amax of an FP8 weight is multiplied, the one of
            least squared error wins; empty: the amax is kept.
        input_format: Format of the activations; None leaves them in BF16 (weight-only).
        constant_input_amax: The input amax where the recipe fixes it; None: calibrated.
    """

    weight_format: Format
    weight_method: WeightMethod | None = None
    fp8_multipliers: tuple[float, ...] = ()
    input_format: Format | None = None
    constant_input_amax: float | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in anything but the source's format."""
        return self.weight_format is not Format.bf16

    @property
    def needs_input_amax(self) -> bool:
        """Whether the input amax has to be measured by a forward pass."""
        return self.input_format is not None and self.constant_input_amax is None


@dataclass(frozen=True)
class KVFormat:
    """FP8 keys and values of one attention layer.

    Attributes:
        constant_amax: The amax where the recipe fixes it; None: calibrated.
    """

    constant_amax: float | None = None


@dataclass(frozen=True)
class Algorithm:
    """Model Optimizer's calibration algorithm, as far as it is supported.

    Attributes:
        method: `max` or `mse`.
        fp8_scale_sweep: Under `mse`: try every E4M3 block scale on static NVFP4 weights and leave
            the others at their amax.
        multipliers: Under `mse` without the sweep: the fp32 candidates by which the amax of every
            static weight is multiplied.
    """

    method: str
    fp8_scale_sweep: bool = False
    multipliers: tuple[float, ...] = ()

    def describe(self) -> str:
        """One phrase for messages."""
        if self.method == "max":
            return "max"
        if self.fp8_scale_sweep:
            return "mse with fp8_scale_sweep"
        low, high = self.multipliers[0], self.multipliers[-1]
        return f"mse with {len(self.multipliers)} multipliers from {low:g} to {high:g}"


@dataclass(frozen=True)
class Entry:
    """One entry of `quant_cfg`.

    Attributes:
        index: Position in the list, from 0.
        pattern: Wildcard on quantizer names.
        enable: Whether matched quantizers are on.
        attributes: What they become, one mapping per quantizer in sequence; empty: as they were.
        parent_class: Only quantizers of a module of this class (Model Optimizer's name for it).
    """

    index: int
    pattern: str
    enable: bool
    attributes: tuple[Attributes, ...] = ()
    parent_class: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A Model Optimizer PTQ recipe."""

    name: str
    description: str
    algorithm: Algorithm
    entries: tuple[Entry, ...]

    def canonical(self) -> dict[str, Any]:
        """What the recipe asks for, without its name and description, ready for JSON."""
        return {
            "algorithm": {
                "method": self.algorithm.method,
                "fp8_scale_sweep": self.algorithm.fp8_scale_sweep,
                "multipliers": list(self.algorithm.multipliers),
            },
            "quant_cfg": [
                {
                    "quantizer_name": entry.pattern,
                    "enable": entry.enable,
                    "cfg": [plain(attributes) for attributes in entry.attributes],
                    "parent_class": entry.parent_class,
                }
                for entry in self.entries
            ],
        }

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical content."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Resolution:
    """What a recipe comes to on one model.

    Attributes:
        formats: Format of every projection inside the layers, BF16 ones included, by module name
            in the checkpoint. Everything else keeps the source's bytes.
        kv: FP8 KV cache by index of the attention layer; empty where the cache stays in BF16.
        unmatched_patterns: Patterns that fit no quantizer of this model, in recipe order.
    """

    formats: dict[str, ModuleFormat]
    kv: dict[int, KVFormat]
    unmatched_patterns: list[str] = field(default_factory=list)

    @property
    def needs_forward(self) -> bool:
        """Whether any input or KV scale has to be calibrated."""
        return any(module.needs_input_amax for module in set(self.formats.values())) or any(
            layer.constant_amax is None for layer in self.kv.values()
        )


def modules_of(tensors: Iterable[NamedTensor]) -> list[ModuleInfo]:
    """The modules that Model Optimizer would wrap, one per projection and expert.

    Linear projections, conv1d, the embedding and the head; never norms, the router or `mtp.*`.
    A head tied to the embedding is a module of its own in the model, so it is one here.
    """
    modules: list[ModuleInfo] = []
    roles: set[Role] = set()
    for tensor in tensors:
        module, _, parameter = tensor.name.rpartition(".")
        if parameter != "weight" or not (
            tensor.role in LINEAR_ROLES
            or tensor.role in (Role.embedding, Role.head)
            or (tensor.role is Role.mamba_other and module.endswith(".conv1d"))
        ):
            continue
        expert = None
        if tensor.role is Role.routed_expert:
            expert = int(module.rpartition(".experts.")[2].partition(".")[0])
        modules.append(ModuleInfo(module, tensor.role, tensor.layer, expert))
        roles.add(tensor.role)
    if Role.embedding in roles and Role.head not in roles:
        modules.append(ModuleInfo("lm_head", Role.head))
    return modules


def plain(value: Any) -> Any:
    """Mappings, tuples and numbers as JSON has them (keys become strings)."""
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
