"""The slots: one resident module per layer type, refilled for every layer of that type.

In: a callable that reads this rank's shard of a tensor; hidden states. Out: the hidden states
after the layer, and views of the weights that the slot holds now, for choosing scales and packing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from pipeline.architecture import Architecture, LayerType, TensorSpec, layer_tensors
from pipeline.errors import LayoutError, SourceError
from pipeline.mcore.attention import Attention
from pipeline.mcore.backend import Groups
from pipeline.mcore.config import transformer_config
from pipeline.mcore.linear import FeedForward
from pipeline.mcore.mamba import Mamba
from pipeline.mcore.moe import MoE
from pipeline.mcore.names import Place, expert_place, places_of
from pipeline.mcore.norms import RMSNorm
from pipeline.mcore.tap import Probe, Tap
from pipeline.sharding import ParallelDims, Shard, check_layout, shard_of

ReadShard = Callable[[TensorSpec, Shard], torch.Tensor]


class Slot:
    """One layer type's module: `hidden + mixer(norm(hidden))`, and which layer it holds.

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
        self._architecture, self._dims, self._rank = architecture, dims, rank
        self._norm, self._mixer, self._probe = norm, mixer, probe
        self._places = places_of(architecture, layer_type, norm, mixer)
        local = architecture.n_routed_experts // dims.ep
        self._first_expert = local * dims.coordinates(rank).ep_rank

    def fill(self, layer: int, read: ReadShard) -> None:
        """Loads this rank's shards of `layer`.

        Args:
            layer: Index of a layer of this slot's type.
            read: Gives a CPU tensor of the shard's shape in the source dtype.

        Raises:
            SourceError: A tensor has another shape than config.json implies.
        """
        assert self._architecture.layers[layer] is self.layer_type
        self.layer = None
        written: Counter[tuple[int, str]] = Counter()
        for spec in layer_tensors(self._architecture, layer):
            shard = shard_of(spec, self._architecture, self._dims, self._rank)
            if shard is None:
                continue
            place = self._place(spec.name)
            _load(spec, shard, place, read(spec, shard))
            written[id(place.module), place.attribute] += place.tensor.numel()
        self._zero_absent_conv_bias(written)
        self._assert_all_written(written)
        self.layer = layer

    def weight(self, name: str) -> torch.Tensor:
        """This rank's shard [N_local, K_local] of a dense linear of the layer held now (a view)."""
        self._assert_holds(name)
        return self._place(name).tensor.detach()

    def experts(self, projection: str) -> tuple[torch.Tensor, int]:
        """Stacked local experts of "up_proj" or "down_proj", and the first one's index.

        Returns:
            A view [E_local, N_local, K_local], and which expert its first entry is.
        """
        assert self.layer is not None
        stacked: torch.Tensor = getattr(self._mixer.get_submodule("experts"), projection)
        return stacked.detach(), self._first_expert

    @torch.inference_mode()
    def forward(self, hidden: torch.Tensor, tap: Tap | None = None) -> torch.Tensor:
        """Hidden states [seq/tp, batch, hidden] after the layer held now."""
        assert self.layer is not None, "forward before fill"
        self._probe.tap = tap
        try:
            mixed: torch.Tensor = self._mixer(self._norm(hidden))
        finally:
            self._probe.tap = None
        return hidden + mixed

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter, and every buffer that takes part in the forward, by module name."""
        found = {}
        for prefix, module in (("norm", self._norm), ("mixer", self._mixer)):
            for name, tensor in module.named_parameters(prefix):
                found[name] = tensor.detach()
            for name, buffer in module.named_buffers(prefix):
                if name.endswith(".expert_bias"):  # the router's other buffers count for training
                    found[name] = buffer
        return found

    def _place(self, name: str) -> Place:
        inner = name.split(".", 3)[3]
        if inner.startswith("mixer.experts."):
            return expert_place(inner, self._mixer.get_submodule("experts"), self._first_expert)
        return self._places[inner]

    def _assert_holds(self, name: str) -> None:
        prefix = f"backbone.layers.{self.layer}."
        assert name.startswith(prefix), f"the slot holds {prefix}*, not {name}"

    def _zero_absent_conv_bias(self, written: Counter[tuple[int, str]]) -> None:
        """Megatron's mixer always has a convolution bias; without one in the model it is zero."""
        if self.layer_type is LayerType.mamba and not self._architecture.use_conv_bias:
            mixer = self._mixer.get_submodule("mixer")
            bias = mixer.get_parameter("conv1d_bias")
            bias.data.zero_()
            written[id(mixer), "conv1d_bias"] += bias.numel()

    def _assert_all_written(self, written: Counter[tuple[int, str]]) -> None:
        """Nothing of the previous layer (or of uninitialised memory) may be left."""
        sizes = {name: tensor.numel() for name, tensor in self.tensors().items()}
        modules = {"norm": self._norm, "mixer": self._mixer}
        for name, size in sizes.items():
            owner, _, attribute = name.rpartition(".")
            root, _, path = owner.partition(".")
            count = written[id(modules[root].get_submodule(path)), attribute]
            assert count == size, f"{name}: {count} of {size} elements were filled"


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
        ConfigError: A package that the layers need on this device is missing.
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
    config = transformer_config(architecture, layer_type, dims, device, compute_dtype)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if layer_type is LayerType.mamba:
        return Mamba(architecture, config, groups, probe)
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


def _load(spec: TensorSpec, shard: Shard, place: Place, source: torch.Tensor) -> None:
    if tuple(source.shape) != shard.shape:
        raise SourceError(
            spec.name,
            value=f"shape {tuple(source.shape)}",
            rule=f"config.json and the layout imply {shard.shape}",
            remedy="restore the file, or the config.json that belongs to this checkpoint",
        )
    target = place.tensor
    assert target.shape == source.shape, f"{spec.name}: the slot has {tuple(target.shape)}"
    with torch.inference_mode(False), torch.no_grad():
        if spec.keeps_source_dtype and place.attribute != "expert_bias":
            # (The router keeps its correction bias in fp32 itself: widening changes no value.)
            if target.dtype is not source.dtype:
                place.whole.data = torch.empty_like(target, dtype=source.dtype)
            target = place.whole
        target.copy_(source)
