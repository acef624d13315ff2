"""Where packing finds a layer's weights, and where they are loaded to.

In: shards of one layer, tensor by tensor. Out: this rank's shards as [N, K] matrices and stacks of
experts. With a forward pass they lie in a slot of megatron's modules; weight-only recipes need none
and keep what this rank packs in buffers of the same kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from pipeline.architecture import TensorSpec
from pipeline.sharding import Shard


class LayerWeights(Protocol):
    """The shards of one layer."""

    def weight(self, name: str) -> torch.Tensor:
        """Local shard [N, K] of a dense tensor."""

    def experts(self, projection: str, chosen: Sequence[int]) -> torch.Tensor:
        """Stack [len(chosen), N, K] of `up_proj` or `down_proj`; `chosen` are local indices."""


class Loadable(Protocol):
    """What can be filled with one layer after the other, tensor by tensor."""

    def begin_fill(self, layer: int) -> None:
        """The layer held so far is given up."""

    def target_of(self, spec: TensorSpec, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Where a tensor of the layer goes, for sources that write straight into it.

        Args:
            spec: The tensor.
            dtype: What the source holds; tensors that keep the source's dtype take it on.
        """

    def load(self, spec: TensorSpec, shard: Shard, tensor: torch.Tensor) -> None:
        """Takes in one tensor; may copy asynchronously on the current stream."""

    def end_fill(self) -> None:
        """The layer is whole."""


class LayerSlot(Loadable, Protocol):
    """What the sweep uses of `pipeline.mcore.slots.Slot`."""

    def fill(self, layer: int, read: Callable[[TensorSpec, Shard], torch.Tensor]) -> None:
        """Loads this rank's shards of a layer at once."""

    def forward(
        self, hidden: torch.Tensor, tap: Tap | None = None, quantizer: Quantizer | None = None
    ) -> torch.Tensor:
        """Hidden states [seq/tp, batch, hidden] after the layer; may overwrite those before."""

    def weight(self, name: str) -> torch.Tensor:
        """Local shard of a dense tensor."""

    def experts(self, projection: str) -> tuple[torch.Tensor, int]:
        """All local experts, and the index of the first."""


class Tap(Protocol):
    """What a slot reports to (`pipeline.calibration.observers.LayerObserver`)."""

    def activation(self, projection: str, x: torch.Tensor) -> None:
        """Input of a projection, or keys or values."""

    def amax_of(self, projection: str) -> torch.Tensor | None:
        """The running amax that a kernel may raise."""

    def routing(self, chosen_TK: torch.Tensor) -> None:
        """Experts chosen by this rank's own tokens."""


class Quantizer(Protocol):
    """What a slot asks for the inputs of its products (`pipeline.mcore.tap.Quantizer`)."""

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        """What a server's product reads instead of x: a new tensor, or x itself, never changed."""


@dataclasses.dataclass(frozen=True)
class SlotWeights:
    """Weights that lie in a slot."""

    slot: LayerSlot

    def weight(self, name: str) -> torch.Tensor:
        """Local shard [N, K] of a dense tensor."""
        return self.slot.weight(name)

    def experts(self, projection: str, chosen: Sequence[int]) -> torch.Tensor:
        """Stack of the chosen local experts; a view where they are evenly spaced."""
        stack, _ = self.slot.experts(projection)
        return take(stack, chosen)


class Buffers:
    """Weights of one layer at a time, without modules: what this rank packs, and nothing else.

    Args:
        first_expert: Index of this rank's first expert.
        device: Where packing runs.
    """

    def __init__(self, first_expert: int, device: torch.device) -> None:
        self.layer: int | None = None
        self._first_expert, self._device = first_expert, device
        self._dense: dict[str, torch.Tensor] = {}
        self._stacks: dict[str, tuple[torch.Tensor, dict[int, int]]] = {}
        self._experts: dict[str, list[int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def expect(self, coming: Iterable[tuple[TensorSpec, Shard]]) -> None:
        """Tells before a fill which tensors will come."""
        self._experts, self._shapes = {}, {}
        for spec, shard in coming:
            self._shapes[spec.name] = shard.shape
            if spec.is_routed_expert:
                experts = self._experts.setdefault(spec.module.rpartition(".")[2], [])
                experts.append(spec.expert - self._first_expert)

    def begin_fill(self, layer: int) -> None:
        """Gives up the layer held so far, but not its memory."""
        self.layer, self._filling = None, layer
        self._stacks = {
            name: (stack, {e: i for i, e in enumerate(self._experts.get(name, ()))})
            for name, (stack, _) in self._stacks.items()
        }

    def target_of(self, spec: TensorSpec, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A buffer of the shard's shape."""
        assert dtype is not None
        return self._target(spec, self._shapes[spec.name], dtype)

    def load(self, spec: TensorSpec, shard: Shard, tensor: torch.Tensor) -> None:
        """Copies one shard in."""
        target = self.target_of(spec, tensor.dtype)
        assert target.shape == shard.shape, spec.name
        if target.data_ptr() != tensor.data_ptr():
            target.copy_(tensor, non_blocking=True)

    def end_fill(self) -> None:
        """Declares the layer whole."""
        self.layer = self._filling

    def weight(self, name: str) -> torch.Tensor:
        """Local shard [N, K] of a dense tensor."""
        assert name.startswith(f"backbone.layers.{self.layer}."), name
        return self._dense[_inner(name)]

    def experts(self, projection: str, chosen: Sequence[int]) -> torch.Tensor:
        """Stack of the chosen local experts; a view where they are evenly spaced."""
        stack, place = self._stacks[projection]
        return take(stack, [place[expert] for expert in chosen])

    def _target(self, spec: TensorSpec, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if spec.is_routed_expert:
            projection = spec.module.rpartition(".")[2]
            expert = spec.expert - self._first_expert
            if projection not in self._stacks:
                mine = self._experts[projection]
                stack = torch.empty(len(mine), *shape, dtype=dtype, device=self._device)
                self._stacks[projection] = (stack, {e: i for i, e in enumerate(mine)})
            stack, place = self._stacks[projection]
            return stack[place[expert]]
        held = self._dense.get(_inner(spec.name))
        if held is None or held.shape != shape or held.dtype != dtype:
            held = torch.empty(shape, dtype=dtype, device=self._device)
            self._dense[_inner(spec.name)] = held
        return held


def take(stack: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    """Entries of the first dim: a view where they are evenly spaced, else a copy."""
    if len(chosen) == 0:
        return stack[:0]
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    last = chosen[0] + (len(chosen) - 1) * step
    if step > 0 and list(chosen) == list(range(chosen[0], last + 1, step)):
        return stack[chosen[0] : last + 1 : step]
    return stack[list(chosen)]


def _inner(name: str) -> str:
    """`mixer.in_proj.weight` of `backbone.layers.3.mixer.in_proj.weight`."""
    return name.split(".", 3)[3]
