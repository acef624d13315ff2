"""How the tensors of a layer get into a slot: one by one, in any order, without forgetting any.

In: a slot's modules; tensors from the source, on any device. Out: filled modules. Where a tensor
goes is found out once: an MoE layer has a thousand tensors, and forty-eight layers use one slot.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import nn

from pipeline.architecture import Architecture, LayerType, TensorSpec, layer_tensors
from pipeline.errors import SourceError
from pipeline.mcore.names import Place, expert_place, places_of
from pipeline.sharding import ParallelDims, Shard, shard_of


@dataclasses.dataclass(frozen=True)
class Target:
    """Where one tensor of a layer goes.

    Attributes:
        place: In the slot's modules.
        shard: This rank's part of the tensor.
        view: A view of the place; None where it takes the source's dtype and may be made anew.
    """

    place: Place
    shard: Shard
    view: torch.Tensor | None


class Loader:
    """Fills one slot's modules, layer after layer.

    Attributes:
        first_expert: Index of this rank's first expert.
    """

    def __init__(
        self,
        layer_type: LayerType,
        architecture: Architecture,
        dims: ParallelDims,
        rank: int,
        norm: nn.Module,
        mixer: nn.Module,
    ) -> None:
        local = architecture.n_routed_experts // dims.ep
        self.first_expert = local * dims.coordinates(rank).ep_rank
        self._mixer = mixer
        self._places = places_of(architecture, layer_type, norm, mixer)
        self._targets: dict[str, Target] = {}
        for spec in layer_tensors(architecture, architecture.layers_of(layer_type)[0]):
            shard = shard_of(spec, architecture, dims, rank)
            if shard is not None:
                self._targets[_inner(spec.name)] = self._target(spec, shard)
        _assert_all_covered([target.place for target in self._targets.values()], norm, mixer)
        self._missing: set[str] = set()
        self._layer = -1

    def place(self, name: str) -> Place:
        """Where a tensor, by its full name, lies."""
        inner = _inner(name)
        if inner.startswith("mixer.experts."):
            return expert_place(inner, self._mixer.get_submodule("experts"), self.first_expert)
        return self._places[inner]

    def shard_of(self, spec: TensorSpec) -> Shard | None:
        """This rank's part of a tensor; None where another rank owns the expert."""
        target = self._targets.get(_inner(spec.name))
        return None if target is None else target.shard

    def begin(self, layer: int) -> None:
        """All tensors are to come."""
        self._layer = layer
        self._missing = set(self._targets)

    def target_of(self, spec: TensorSpec, dtype: torch.dtype | None) -> torch.Tensor:
        """See `Slot.target_of`."""
        target = self._targets[_inner(spec.name)]
        return target.view if target.view is not None else _retyped(target.place, dtype)

    def load(self, spec: TensorSpec, shard: Shard, tensor: torch.Tensor) -> None:
        """See `Slot.load`."""
        if tensor.shape != shard.shape:
            raise SourceError(
                spec.name,
                value=f"shape {tuple(tensor.shape)}",
                rule=f"config.json and the layout imply {shard.shape}",
                remedy="restore the file, or the config.json that belongs to this checkpoint",
            )
        target = self.target_of(spec, tensor.dtype)
        assert target.shape == tensor.shape, f"{spec.name}: the slot has {tuple(target.shape)}"
        if target.data_ptr() != tensor.data_ptr():
            target.copy_(tensor, non_blocking=True)
        self._missing.discard(_inner(spec.name))

    def end(self) -> int:
        """The layer that is loaded now; nothing of the previous one may be left."""
        assert not self._missing, f"layer {self._layer}: not loaded: {sorted(self._missing)}"
        return self._layer

    def _target(self, spec: TensorSpec, shard: Shard) -> Target:
        place = self.place(spec.name)
        # The router keeps its correction bias in fp32 itself: widening changes no value.
        retypes = spec.keeps_source_dtype and place.attribute != "expert_bias"
        return Target(place, shard, None if retypes else place.tensor.detach())


def tensors_of(norm: nn.Module, mixer: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, and every buffer that is filled, by module name."""
    found = {}
    for prefix, module in (("norm", norm), ("mixer", mixer)):
        for name, tensor in module.named_parameters(prefix):
            found[name] = tensor.detach()
        for name, buffer in module.named_buffers(prefix):
            if name.endswith(".expert_bias"):  # not the zeros of a convolution without a bias
                found[name] = buffer
    return found


def _inner(name: str) -> str:
    """A tensor's name within its layer, "mixer.in_proj.weight"."""
    return name.split(".", 3)[3]


def _retyped(place: Place, dtype: torch.dtype | None) -> torch.Tensor:
    """The whole parameter, made anew where it has another dtype than the source."""
    if dtype is not None and place.whole.dtype is not dtype:
        with torch.inference_mode(False):
            place.whole.data = torch.empty_like(place.whole, dtype=dtype)
    return place.whole.detach()


def _assert_all_covered(places: list[Place], norm: nn.Module, mixer: nn.Module) -> None:
    """The tensors of a layer fill every element of the slot."""
    covered: Counter[tuple[int, str]] = Counter()
    for place in places:
        covered[id(place.module), place.attribute] += place.tensor.numel()
    modules = {"norm": norm, "mixer": mixer}
    for name, tensor in tensors_of(norm, mixer).items():
        owner, _, attribute = name.rpartition(".")
        root, _, path = owner.partition(".")
        count = covered[id(modules[root].get_submodule(path)), attribute]
        assert count == tensor.numel(), f"{name}: {count} of {tensor.numel()} elements"
