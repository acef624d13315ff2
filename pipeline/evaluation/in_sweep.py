"""The evaluation beside the calibration: each layer, while it is in its slot, tells what it costs.

In: evaluation text; per layer a slot that holds BF16 weights, and the scales that calibration has
just chosen. Out: an `EvaluationReport`. Order within a layer: BF16 stream, then the weights are
quantized and dequantized in place, the W4A4 stream, flushed blocks zeroed, the W4A16 stream. The
slot is of no use for anything else afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch

from pipeline.architecture import Architecture
from pipeline.evaluation.fidelity import Head, measure
from pipeline.evaluation.groups import GroupStreams, groups_of, harms
from pipeline.evaluation.records import EvaluationReport, LayerErrors, ServingMode
from pipeline.evaluation.scales import layer_scales
from pipeline.evaluation.streams import Streams
from pipeline.evaluation.weights import ServedWeights
from pipeline.nvfp4.formats import Format
from pipeline.runtime.collectives import Ranks
from pipeline.runtime.lanes import Mark
from pipeline.schedule import LayerSchedule
from pipeline.sharding import ParallelDims
from pipeline.weights import LayerSlot

_ARITHMETIC = {
    torch.float32: "exact products of the quantized values in float32",
    torch.bfloat16: "dequantized weights and inputs rounded to bfloat16 (2**-8 at most), products "
    "added up in float32",
}


@dataclasses.dataclass
class InSweep:
    """One rank's part in the evaluation.

    Attributes:
        architecture: Shape of the model.
        dims: The rank grid.
        ranks: Groups for collectives.
        streams: The evaluation sequences.
        backend: Name of what quantizes weights.
        data: Where the text came from, in words.
        dtype: Compute dtype.
        groups: Tells which layer hurts; None where nobody asked.
    """

    architecture: Architecture
    dims: ParallelDims
    ranks: Ranks
    streams: Streams
    backend: str
    data: str
    dtype: torch.dtype
    groups: GroupStreams | None = None

    def __post_init__(self) -> None:
        """Nothing has been computed."""
        self._marks: list[tuple[Mark, Mark]] = []
        self._seconds_before = 0.0
        self._wait: Callable[[], object] | None = None

    @property
    def key(self) -> str:
        """Tells evaluations apart that are on different text, or with other groups."""
        tokens = self.streams.store.token_ids
        groups = None if self.groups is None else list(self.groups.store.token_ids.shape)
        shapes = f"{list(tokens.shape)} {groups}"
        return hashlib.sha256(shapes.encode() + tokens.numpy().tobytes()).hexdigest()

    def visit(self, schedule: LayerSchedule, slot: LayerSlot, scalars: Mapping[str, float]) -> None:
        """Moves all streams through a layer; a collective.

        Args:
            schedule: What the layer's tensors become.
            slot: Holds its BF16 weights, which are lost.
            scalars: The layer's activation scalars by tensor name.
        """
        if self._wait is not None:
            self._wait()
            self._wait = None
        begun = Mark(self.ranks.device)
        self.streams.bf16(slot)
        self.quantized(schedule, slot, scalars)
        self.streams.end_layer()
        self._marks.append((begun, Mark(self.ranks.device)))

    def quantized(
        self, schedule: LayerSchedule, slot: LayerSlot, scalars: Mapping[str, float]
    ) -> None:
        """Moves all but the BF16 stream through a layer, whose BF16 stream has passed.

        Args:
            schedule: What the layer's tensors become.
            slot: Holds its BF16 weights, which are lost.
            scalars: The layer's activation scalars by tensor name.
        """
        streams = self.streams
        with torch.inference_mode():
            served = ServedWeights(
                schedule, slot, self.architecture, self.dims, self.ranks, self.backend
            )
            scales = layer_scales(schedule, scalars)
            if self.groups is not None:
                groups = groups_of(schedule, self.architecture)
                self.groups.visit(slot, served, scales, groups)
            served.dequantize()
        formats = {item.module_format.weight_format for item in schedule.dense}
        formats |= {module_format.weight_format for module_format in schedule.experts.values()}
        formats |= {item.format for item in scales.values()}
        for mode in streams.modes:
            if mode is ServingMode.w4a16:
                with torch.inference_mode():
                    served.flush()
            streams.quantized(
                schedule.layer,
                mode,
                slot,
                scales,
                is_bf16=not formats,
                is_same=Format.nvfp4 not in formats,
            )

    def finish(self, head: Head) -> EvaluationReport:
        """Compares the streams after the last layer; a collective."""
        begun = Mark(self.ranks.device)
        report = conclude(
            self.streams, head, self.ranks, self.architecture, data=self.data, dtype=self.dtype
        )
        if self.groups is not None:
            kl = self.groups.kl(head, self.ranks)
            report.groups = harms(self.groups.groups, kl, self.groups.parameters)
            report.group_tokens = self.groups.tokens
        ended = Mark(self.ranks.device)
        ended.synchronize()
        report.seconds = self._seconds() + begun.seconds_until(ended)
        return report

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next layer changes, where it lies; `keep_until` puts that off.

        Waits for the device: the seconds so far are part of it.
        """
        if self._marks:
            self._marks[-1][1].synchronize()
        found = {f"streams.{name}": tensor for name, tensor in self.streams.state().items()}
        if self.groups is not None:
            found |= {f"groups.{name}": tensor for name, tensor in self.groups.state().items()}
        return {**found, "seconds": torch.tensor(self._seconds(), dtype=torch.float64)}

    def keep_until(self, wait: Callable[[], object]) -> None:
        """Before the next visit overwrites anything, this call returns."""
        self._wait = wait

    def restore(self, state: Mapping[str, torch.Tensor], passed: Sequence[LayerSchedule]) -> None:
        """Takes over `state()` of an evaluation of the same text.

        Args:
            state: What it was.
            passed: The layers that it had passed.
        """
        self._seconds_before = float(state["seconds"])
        self.streams.restore(below("streams.", state))
        if self.groups is not None:
            groups = [group for s in passed for group in groups_of(s, self.architecture)]
            self.groups.restore(below("groups.", state), groups)

    def _seconds(self) -> float:
        return self._seconds_before + sum(a.seconds_until(b) for a, b in self._marks)


def below(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a state whose names begin so, by what follows."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def conclude(
    streams: Streams,
    head: Head,
    ranks: Ranks,
    architecture: Architecture,
    *,
    data: str,
    dtype: torch.dtype,
) -> EvaluationReport:
    """What the streams say of each other after the last layer; a collective.

    Args:
        streams: Of the evaluation.
        head: Final norm and head.
        ranks: All ranks.
        architecture: Shape of the model.
        data: Where the text came from, in words.
        dtype: Compute dtype.
    """
    measured = measure(streams, head, ranks)
    errors = zip(architecture.layers, streams.errors(ranks), strict=True)
    sequences, seq_len = streams.store.token_ids.shape
    return EvaluationReport(
        data=data,
        sequences=sequences,
        seq_len=seq_len,
        arithmetic=_ARITHMETIC[dtype],
        perplexity=measured.perplexity,
        modes=measured.modes,
        layers=[
            LayerErrors(
                layer=layer,
                layer_type=layer_type.value,
                accumulated={mode.value: pair[0] for mode, pair in by_mode.items()},
                alone={mode.value: pair[1] for mode, pair in by_mode.items()},
            )
            for layer, (layer_type, by_mode) in enumerate(errors)
        ],
        inputs=streams.input_ranges(ranks),
    )
