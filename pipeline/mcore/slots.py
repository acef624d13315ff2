"""The slots: one resident module per layer type, refilled for every layer of that type.

In: a callable that reads this rank's shard of a tensor; hidden states. Out: the hidden states
after the layer, and views of the weights that the slot holds now, for choosing scales and packing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from pipeline.architecture import Architecture, LayerType, TensorSpec, layer_tensors
from pipeline.errors import LayoutError
from pipeline.mcore.attention import Attention
from pipeline.mcore.backend import Groups
from pipeline.mcore.config import transformer_config
from pipeline.mcore.linear import FeedForward
from pipeline.mcore.loading import Loader, tensors_of
from pipeline.mcore.mamba import Mamba
from pipeline.mcore.moe import MoE
from pipeline.mcore.norms import RMSNorm
from pipeline.mcore.tap import Probe, Quantizer, Tap
from pipeline.sharding import ParallelDims, Shard, check_layout

ReadShard = Callable[[TensorSpec, Shard], torch.Tensor]

# The projection that reads the norm's output, by layer type.
_READERS = {
    LayerType.mamba: "in_proj",
    LayerType.attention: "qkv",
    LayerType.mlp: "up_proj",
}


class Slot:
    """One layer type's module: `hidden + mixer(norm(hidden))`, and which layer it holds.

    A slot may be filled by another thread than the one that runs the forward pass, on a stream of
    its own; the caller orders the two.

    Attributes:
        layer_type: The type of layer that fits.
        layer: The layer it holds, or None before the first `fill` (or after a failed one).
    """

    def __init__(
        self,
        layer_type: LayerType,
        architecture: Architecture,
        dims: ParallelDims,
        rank: int,
        *,
        norm: nn.Module,
        mixer: nn.Module,
        probe: Probe,
    ) -> None:
        self.layer_type = layer_type
        self.layer: int | None = None
        self._architecture = architecture
        self._norm, self._mixer, self._probe = norm, mixer, probe
        self._loader = Loader(layer_type, architecture, dims, rank, norm, mixer)

    def fill(self, layer: int, read: ReadShard) -> None:
        """Loads this rank's shards of `layer`.

        Args:
            layer: Index of a layer of this slot's type.
            read: Gives a tensor of the shard's shape in the source dtype, on any device.

        Raises:
            SourceError: A tensor has another shape than config.json implies.
        """
        self.begin_fill(layer)
        for spec in layer_tensors(self._architecture, layer):
            shard = self._loader.shard_of(spec)
            if shard is not None:
                self.load(spec, shard, read(spec, shard))
        self.end_fill()

    def begin_fill(self, layer: int) -> None:
        """Empties the slot, for the tensors of `layer` to be loaded in any order."""
        assert self._architecture.layers[layer] is self.layer_type
        self.layer = None
        self._loader.begin(layer)

    def target_of(self, spec: TensorSpec, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The slot's own memory for a tensor, to be written and then handed to `load`.

        Args:
            spec: A tensor of the layer being filled.
            dtype: Of the source, for tensors that keep it; None where it is known not to change.

        Returns:
            A view on the slot's device, of the shard's shape, in the compute dtype (or `dtype`).
        """
        return self._loader.target_of(spec, dtype)

    def load(self, spec: TensorSpec, shard: Shard, tensor: torch.Tensor) -> None:
        """Loads one tensor, on the current stream.

        Args:
            spec: A tensor of the layer being filled.
            shard: This rank's part of it.
            tensor: That part in the source's dtype. It may lie in pinned host memory, which must
                stay as it is until the stream has come past this call; on this device; or be what
                `target_of` gave, which holds the values already.

        Raises:
            SourceError: The tensor has another shape than config.json implies.
        """
        self._loader.load(spec, shard, tensor)

    def end_fill(self) -> None:
        """Declares the layer complete: nothing of the previous one may be left."""
        self.layer = self._loader.end()

    def weight(self, name: str) -> torch.Tensor:
        """This rank's shard [N_local, K_local] of a dense linear of the layer held now (a view)."""
        self._assert_holds(name)
        return self._loader.place(name).tensor.detach()

    def experts(self, projection: str) -> tuple[torch.Tensor, int]:
        """Stacked local experts of "up_proj" or "down_proj", and the first one's index.

        Returns:
            A view [E_local, N_local, K_local], and which expert its first entry is.
        """
        assert self.layer is not None
        stacked: torch.Tensor = getattr(self._mixer.get_submodule("experts"), projection)
        return stacked.detach(), self._loader.first_expert

    @torch.inference_mode()
    def forward(
        self, hidden: torch.Tensor, tap: Tap | None = None, quantizer: Quantizer | None = None
    ) -> torch.Tensor:
        """Moves hidden states through the layer held now.

        Args:
            hidden: Contiguous [seq/tp, batch, hidden]; overwritten by the result.
            tap: Sees what the layer computes, before any quantizer.
            quantizer: Gives what projections read and what the KV cache holds. The norm, the router
                and the convolution read the values as they are.

        Returns:
            `hidden` itself.
        """
        assert self.layer is not None, "forward before fill"
        self._probe.tap, self._probe.quantizer = tap, quantizer
        try:
            mixed: torch.Tensor = self._mixer(self._normalize(hidden))
        finally:
            self._probe.tap = self._probe.quantizer = None
        return hidden.add_(mixed)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter, and every buffer that is filled, by module name."""
        return tensors_of(self._norm, self._mixer)

    def _normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """The mixer's input, and its amax for every projection that reads it."""
        wanted = [self._probe.amax_of(name) for name in self._readers()]
        asked = [amax for amax in wanted if amax is not None]
        if len(asked) < 2:
            normed: torch.Tensor = self._norm(hidden, asked[0] if asked else None)
            return normed
        shared = torch.zeros_like(asked[0])
        normed = self._norm(hidden, shared)
        for amax in asked:
            torch.maximum(amax, shared, out=amax)
        return normed

    def _readers(self) -> list[str]:
        """The projections that read the norm's output as it is (experts read rows of it)."""
        a = self._architecture
        if self.layer_type is not LayerType.moe:
            return [_READERS[self.layer_type]]
        readers = {
            "fc1_latent_proj": a.moe_latent_size is not None,
            "shared_experts.up_proj": a.has_shared_experts,
        }
        return [name for name, exists in readers.items() if exists]

    def _assert_holds(self, name: str) -> None:
        prefix = f"backbone.layers.{self.layer}."
        assert name.startswith(prefix), f"the slot holds {prefix}*, not {name}"


def build_slots(
    architecture: Architecture,
    dims: ParallelDims,
    rank: int,
    groups: Groups,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    seq_len: int,
) -> dict[LayerType, Slot]:
    """One empty slot for each layer type that the model has.

    Args:
        architecture: The model.
        dims: Degrees of parallelism, those that `backend.start` was given.
        rank: This process's rank.
        groups: What `backend.start` returned.
        device: Where the slots live.
        compute_dtype: Dtype of weights and activations.
        seq_len: Length of a calibration sequence, padding included.

    Raises:
        LayoutError: The degrees do not fit the model or the sequence length.
        ArchitectureError: A setting that the layers cannot compute.
    """
    for error in check_layout(architecture, dims):
        raise error
    if seq_len % dims.tp:
        raise LayoutError(
            "calibration sequence length",
            value=seq_len,
            rule=f"sequence parallelism cuts it into tp={dims.tp} equal parts",
            remedy=f"pad to a multiple of {dims.tp}",
        )
    assert (groups.dims, groups.rank) == (dims, rank)
    slots = {}
    with torch.inference_mode(False):
        for layer_type in dict.fromkeys(architecture.layers):
            probe = Probe()
            norm = RMSNorm(
                architecture.hidden_size,
                architecture.layer_norm_epsilon,
                device=device,
                dtype=compute_dtype,
            )
            mixer = _build_mixer(layer_type, architecture, dims, device, compute_dtype, probe)
            for module in (norm, mixer):
                module.to(device).eval().requires_grad_(False)
            slots[layer_type] = Slot(
                layer_type, architecture, dims, rank, norm=norm, mixer=mixer, probe=probe
            )
    return slots


def _build_mixer(
    layer_type: LayerType,
    architecture: Architecture,
    dims: ParallelDims,
    device: torch.device,
    compute_dtype: torch.dtype,
    probe: Probe,
) -> nn.Module:
    config = transformer_config(architecture, dims, compute_dtype)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if layer_type is LayerType.mamba:
        return Mamba(architecture, config, groups, probe, device)
    if layer_type is LayerType.attention:
        return Attention(architecture, config, groups, probe)
    if layer_type is LayerType.moe:
        return MoE(architecture, config, groups, probe, device)
    return FeedForward(
        architecture.intermediate_size,
        bias=architecture.mlp_bias,
        probe=probe,
        config=config,
        pg_collection=groups,
    )
