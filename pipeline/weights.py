"""Where packing finds a layer's weights: in a slot, or in buffers read straight from the source.

In: a filled slot, or the shards that the read-ahead fetched. Out: this rank's shards as [N, K]
matrices and stacks of experts. Weight-only recipes need no forward pass, hence no slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from pipeline.architecture import TensorSpec
from pipeline.sharding import Shard


class LayerWeights(Protocol):
    """The shards of one layer."""

    def weight(self, name: str) -> torch.Tensor:
        """Local shard [N, K] of a dense tensor."""

    def experts(self, projection: str, chosen: list[int]) -> torch.Tensor:
        """Stack [len(chosen), N, K] of `up_proj` or `down_proj`; `chosen` are local indices."""


class LayerSlot(Protocol):
    """What the sweep uses of `pipeline.mcore.slots.Slot`."""

    def fill(self, layer: int, read: Callable[[TensorSpec, Shard], torch.Tensor]) -> None:
        """Loads this rank's shards of a layer."""

    def forward(self, hidden: torch.Tensor, tap: Tap | None = None) -> torch.Tensor:
        """Hidden states [seq/tp, batch, hidden] after the layer."""

    def weight(self, name: str) -> torch.Tensor:
        """Local shard of a dense tensor."""

    def experts(self, projection: str) -> tuple[torch.Tensor, int]:
        """All local experts, and the index of the first."""


class Tap(Protocol):
    """What a slot reports to (`pipeline.calibration.observers.LayerObserver`)."""

    def activation(self, projection: str, x: torch.Tensor) -> None:
        """Input of a projection, or keys or values."""

    def routing(self, routing_map: torch.Tensor) -> None:
        """Experts chosen by this rank's own tokens."""


@dataclasses.dataclass(frozen=True)
class SlotWeights:
    """Weights that lie in a slot."""

    slot: LayerSlot

    def weight(self, name: str) -> torch.Tensor:
        """Local shard [N, K] of a dense tensor."""
        return self.slot.weight(name)

    def experts(self, projection: str, chosen: list[int]) -> torch.Tensor:
        """Stack of the chosen local experts; a view where all are chosen."""
        stack, _ = self.slot.experts(projection)
        return stack if len(chosen) == stack.shape[0] else stack[chosen]


@dataclasses.dataclass(frozen=True)
class StreamedWeights:
    """Weights as they were read, for a sweep without a forward pass.

    Attributes:
        layer: Index of the layer.
        first_expert: Index of this rank's first expert.
        tensors: Shards by full name.
        device: Where packing runs.
    """

    layer: int
    first_expert: int
    tensors: Mapping[str, torch.Tensor]
    device: torch.device

    def weight(self, name: str) -> torch.Tensor:
        """Local shard [N, K] of a dense tensor."""
        return self.tensors[name].to(self.device)

    def experts(self, projection: str, chosen: list[int]) -> torch.Tensor:
        """Stack of the chosen local experts."""
        prefix = f"backbone.layers.{self.layer}.mixer.experts"
        names = (f"{prefix}.{self.first_expert + e}.{projection}.weight" for e in chosen)
        return torch.stack([self.tensors[name] for name in names]).to(self.device)
