"""Which layer hurts: streams in which one group of projections alone is quantized.

In: some evaluation text, shorter than the rest; layer by layer a slot. Out: for each group of each
layer the KL that quantizing it alone adds (weights and inputs, W4A4), all other layers and groups
in BF16. A stream starts at its group's layer from the BF16 stream's hidden states there, and passes
the layers above together with the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.architecture import Architecture, TensorSpec, layer_tensors
from pipeline.calibration.hidden import HiddenStore, same_shape
from pipeline.evaluation.fidelity import Divergence, Head, compare, next_tokens
from pipeline.evaluation.inputs import InputQuantizer
from pipeline.evaluation.records import GroupHarm, ServingMode
from pipeline.evaluation.scales import LayerScales
from pipeline.evaluation.weights import ServedWeights
from pipeline.nvfp4.formats import Format
from pipeline.recipe import ModuleFormat
from pipeline.runtime.collectives import Ranks, reduce_sum
from pipeline.schedule import LayerSchedule, tap_of
from pipeline.sharding import ParallelDims
from pipeline.weights import LayerSlot

ROUTED = "routed_experts"
_NAMES = {
    "k_cache": "kv_cache",
    "v_cache": "kv_cache",
    "experts.up_proj": ROUTED,
    "experts.down_proj": ROUTED,
    "shared_experts.up_proj": "shared_experts",
    "shared_experts.down_proj": "shared_experts",
    "fc1_latent_proj": "latent",
    "fc2_latent_proj": "latent",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# They end in a wildcard: a recipe's patterns are matched against the names of quantizers.
_PATTERNS = {
    ROUTED: ".experts.*",
    "shared_experts": ".shared_experts.*",
    "latent": ".fc?_latent_proj*",
    "mlp": ".*_proj*",
    "qkv": ".[qkv]_proj*",
    "kv_cache": ".[kv]_bmm_quantizer",
}
_POSITIONS = 512


@dataclass(frozen=True)
class Group:
    """Projections of one layer that are quantized together.

    Attributes:
        layer: Its index.
        layer_type: Its type.
        name: `GroupHarm.group`.
        taps: Their inputs.
        weights: Their weights, with what the recipe makes of each.
    """

    layer: int
    layer_type: str
    name: str
    taps: frozenset[str]
    weights: tuple[tuple[TensorSpec, ModuleFormat], ...]


def groups_of(schedule: LayerSchedule, architecture: Architecture) -> list[Group]:
    """The groups of a layer that are quantized, routed experts last."""
    formats = {item.spec.module: item.module_format for item in schedule.dense}
    members: dict[str, list[tuple[TensorSpec, ModuleFormat]]] = {}
    taps: dict[str, set[str]] = {}
    for spec in layer_tensors(architecture, schedule.layer):
        projection = spec.module.rpartition(".")[2]
        module_format = formats.get(spec.module)
        if spec.is_routed_expert:
            module_format = schedule.experts.get(projection)
        if module_format is None or not spec.is_linear_weight:
            continue
        tap = tap_of(spec.module)
        name = _NAMES.get(tap, tap)
        members.setdefault(name, []).append((spec, module_format))
        taps.setdefault(name, set()).add(tap)
    if schedule.kv is not None:
        members["kv_cache"], taps["kv_cache"] = [], {"k_cache", "v_cache"}
    names = sorted(members, key=lambda name: name == ROUTED)
    kind = schedule.layer_type.value
    return [
        Group(schedule.layer, kind, name, frozenset(taps[name]), tuple(members[name]))
        for name in names
    ]


class GroupStreams:
    """One stream for each group met so far, and the BF16 stream that they are compared with.

    Args:
        token_ids: int64 [sequences, seq_len], the same on every rank.
        embedding: [vocab, hidden], in the source's dtype.
        dims: The rank grid.
        rank: This rank.
        tokens_at_a_time: Of one forward call.
        dtype: Compute dtype.
        device: Where the layers run.
        backend: Name of what quantizes inputs.
        parameters: Of the whole model.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        embedding: torch.Tensor,
        dims: ParallelDims,
        rank: int,
        *,
        tokens_at_a_time: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        parameters: int,
    ) -> None:
        self.parameters = parameters
        count = len(token_ids)
        self.store = HiddenStore(
            token_ids, embedding, dims, rank, micro_batch=count, dtype=dtype, device=device
        )
        (self._batch,) = self.store.batches
        self._backend = backend
        sequences = self._batch.hidden.shape[1]
        self._together = max(1, tokens_at_a_time // (token_ids.shape[1] * sequences))
        self.groups: list[Group] = []
        self._streams: list[torch.Tensor] = []

    @property
    def tokens(self) -> int:
        """Distinct tokens of all ranks."""
        return self.store.tokens

    @torch.inference_mode()
    def visit(
        self,
        slot: LayerSlot,
        served: ServedWeights,
        scales: LayerScales,
        groups: Sequence[Group],
    ) -> None:
        """Moves all streams through a layer, and starts those of its groups.

        Args:
            slot: Holds the BF16 weights; afterwards its routed experts are quantized, if any are.
            served: Of this layer, nothing of it quantized yet.
            scales: Of the layer's inputs.
            groups: Of the layer, routed experts last.
        """
        before = self._batch.hidden.clone()
        self._batch.hidden = slot.forward(self._batch.hidden)
        for start in range(0, len(self._streams), self._together):
            some = slice(start, start + self._together)
            moved = slot.forward(torch.cat(self._streams[some], dim=1))
            self._streams[some] = [part.contiguous() for part in moved.split(before.shape[1], 1)]
        for group in groups:
            quantizer = InputQuantizer(
                scales, ServingMode.w4a4, before.device, self._backend, taps=group.taps
            )
            if group.name == ROUTED:
                served.dequantize(group.taps)
                self._streams.append(slot.forward(before.clone(), quantizer=quantizer))
            else:
                with served.only(group.taps):
                    self._streams.append(slot.forward(before.clone(), quantizer=quantizer))
            self.groups.append(group)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next layer changes, where it lies; the streams as they began."""
        streams = {f"{number:05d}": stream for number, stream in enumerate(self._streams)}
        return {"bf16": self._batch.hidden, **streams}

    @torch.inference_mode()
    def restore(self, state: Mapping[str, torch.Tensor], groups: Sequence[Group]) -> None:
        """Takes over `state()` of streams of the same text.

        Args:
            state: What it was.
            groups: Of the layers that it had passed, in their order.
        """
        hidden = self._batch.hidden
        assert len(state) == len(groups) + 1
        hidden.copy_(same_shape(state["bf16"], hidden))
        found = [state[f"{number:05d}"] for number in range(len(groups))]
        self._streams = [
            same_shape(stream, hidden).to(hidden.device, copy=True) for stream in found
        ]
        self.groups = list(groups)

    @torch.inference_mode()
    def kl(self, head: Head, ranks: Ranks) -> list[float]:
        """Mean KL of each group, in the order of `groups`; a collective."""
        head = head.to(ranks.device)
        totals = torch.zeros(len(self.groups) + 1, dtype=torch.float64)
        for column, index in enumerate(self._batch.sequences):
            if float(self._batch.weights[column]) == 0.0:
                continue
            targets = next_tokens(self.store, index).to(ranks.device)
            for start in range(0, len(targets), _POSITIONS):
                here = slice(start, min(start + _POSITIONS, len(targets)))
                reference = head.log_probabilities(self._batch.hidden[here, column])
                totals[-1] += len(reference)
                for number, stream in enumerate(self._streams):
                    found = Divergence()
                    predicted = head.log_probabilities(stream[here, column])
                    compare(reference, predicted, targets[here], found)
                    totals[number] += found.kl[0].double().sum()
        *sums, count = reduce_sum(totals.to(ranks.device), ranks.world).tolist()
        return [value / count for value in sums]


def harms(groups: Sequence[Group], kl: Sequence[float], parameters: int) -> list[GroupHarm]:
    """What each group does, the worst first.

    Args:
        groups: Of all layers.
        kl: Mean KL of each; one that is no number is worse than any.
        parameters: Of the whole model, by which stored bits are divided.
    """
    found = [
        GroupHarm(
            layer=group.layer,
            layer_type=group.layer_type,
            group=group.name,
            pattern=f"*.layers.{group.layer}.mixer{_PATTERNS.get(group.name, f'.{group.name}*')}",
            format=", ".join(sorted({_format_of(f) for _, f in group.weights})) or "fp8",
            kl_mean=value,
            extra_bits_fp8=_extra_bits(group, 8.0) / parameters if _has_nvfp4(group) else None,
            extra_bits_bf16=_extra_bits(group, 16.0) / parameters,
        )
        for group, value in zip(groups, kl, strict=True)
    ]
    return sorted(found, key=lambda harm: (not math.isnan(harm.kl_mean), -harm.kl_mean))


def _format_of(module_format: ModuleFormat) -> str:
    return module_format.weight_format.value


def _has_nvfp4(group: Group) -> bool:
    return any(f.weight_format is Format.nvfp4 for _, f in group.weights)


def _extra_bits(group: Group, bits: float) -> float:
    """Bits that a group's weights would take more, at so many for each."""
    stored = {Format.nvfp4: 4.5, Format.fp8: 8.0}
    return sum(spec.parameters * (bits - stored[f.weight_format]) for spec, f in group.weights)
