"""Several recipes on one model, in one sweep: one read of the source, one BF16 stream.

In: a `CompareConfig` and this process's place. Out: a `RunReport` for each recipe, as if each had
been run alone, without a checkpoint. Each layer is calibrated once, for all inputs that any recipe
asks about; then every recipe in turn quantizes it in its slot, and gets the BF16 weights back from
the host.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.architecture import LayerType
from pipeline.assembly import (
    agree_on_memory,
    connect,
    describe_evaluation,
    make_slots,
    make_streams,
)
from pipeline.calibration.choose import choose_scalars
from pipeline.calibration.hidden import HiddenStore, MicroBatch
from pipeline.calibration.observers import LayerObserver
from pipeline.calibration.reduce import ReducedStatistics, refuse_nonfinite
from pipeline.checkpoint.journal import SCALARS, LayerRecord, PartRecord
from pipeline.config_compare import CompareConfig
from pipeline.evaluation.in_sweep import InSweep
from pipeline.evaluation.originals import Originals
from pipeline.evaluation.streams import Streams
from pipeline.filling import SlotFiller
from pipeline.packing import LayerPacker
from pipeline.preflight import Preflight
from pipeline.preparation import Place, Prepared, packing_backend, prepare_several
from pipeline.reading import Reading, make_feed, read_head, requests_of
from pipeline.report.records import RunReport
from pipeline.run_report import build_report
from pipeline.runtime.collectives import Ranks, broadcast_object, gather_objects
from pipeline.runtime.lanes import Mark
from pipeline.runtime.progress import Progress
from pipeline.schedule import LayerSchedule
from pipeline.tokens import TokenIds, load_tokens
from pipeline.weights import LayerSlot, SlotWeights

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Contender:
    """One recipe on its way through the layers.

    Attributes:
        prepared: What it makes of the model.
        packer: Tells what its weights lose.
        evaluation: Its streams.
        parts: By layer, this rank's weight statistics; and on every rank what was observed.
        seconds: Spent on this recipe alone.
    """

    prepared: Prepared
    packer: LayerPacker
    evaluation: InSweep
    parts: dict[int, tuple[dict[str, Any], dict[str, Any]]] = dataclasses.field(
        default_factory=dict
    )
    seconds: float = 0.0

    def visit(
        self,
        config: CompareConfig,
        layer: int,
        slot: LayerSlot,
        observed: Mapping[str, torch.Tensor],
    ) -> None:
        """Quantizes a layer and moves this recipe's streams through it.

        Args:
            config: What the user asked for.
            layer: Its index; its BF16 stream has passed.
            slot: Holds its BF16 weights, which are lost.
            observed: Reduced statistics of the layer, for all recipes.
        """
        begun = time.monotonic()
        schedule = self.prepared.job.schedules[layer]
        amax = {name: observed[name].float() for name in schedule.observed}
        scalars = choose_scalars(
            schedule,
            amax,
            self.prepared.job.architecture.n_routed_experts,
            clamp_kv_scales=config.clamp_kv_scales,
            unobserved_input_scale=config.unobserved_input_scale,
        )
        packing = self.packer.begin(schedule, SlotWeights(slot))
        with torch.inference_mode():
            for _ in packing.steps():
                pass
        packed = packing.finish()
        self.evaluation.quantized(schedule, slot, scalars)
        tokens = observed.get("tokens_per_expert")
        told = {
            "amax": {name: float(value) for name, value in amax.items()},
            "tokens": config.calibration.num_sequences * config.calibration.seq_len,
            "tokens_per_expert": [] if tokens is None else [round(n) for n in tokens.tolist()],
        }
        self.parts[layer] = ({"packed": packed}, told)
        self.seconds += time.monotonic() - begun


def compare_recipes(config: CompareConfig, conf_dir: Path, place: Place) -> list[RunReport] | None:
    """Runs the comparison; returns a report for each recipe on rank 0.

    Raises:
        LayersweepError: Anything a user can cause.
    """
    clock = time.monotonic()
    preflight = Preflight(place, conf_dir, answer_s=60.0 * config.timeout_minutes)
    with preflight.sharing():
        prepared = prepare_several(config, config.recipes, conf_dir, place)
        first = prepared[0]
        tokens = None
        if place.rank == 0:
            vocab_size = first.job.architecture.vocab_size
            tokens = load_tokens(config, conf_dir, first.source, vocab_size)
    preflight.check_reading(config, [first.source], first)
    ranks, groups = connect(config, first, place, forward=True)
    first = agree_on_memory(first, ranks)
    tokens = broadcast_object(tokens, ranks.world)
    contenders, slots, store = _line_up(config, [first, *prepared[1:]], ranks, groups, tokens)
    phases = {"prepare": time.monotonic() - clock}
    clock = time.monotonic()
    _visit_layers(config, contenders, ranks, slots, store)
    phases["sweep"] = time.monotonic() - clock - sum(c.seconds for c in contenders)
    return _report(config, contenders, ranks, phases)


def _line_up(
    config: CompareConfig,
    prepared: Sequence[Prepared],
    ranks: Ranks,
    groups: Any,
    tokens: TokenIds,
) -> tuple[list[Contender], Mapping[LayerType, LayerSlot], HiddenStore]:
    first, backend = prepared[0], packing_backend(config, ranks.device)
    job = first.job
    embedding = first.source.read(job.stored["backbone.embeddings.weight"].name).to(ranks.device)
    slots, store = make_slots(first, ranks, groups, tokens.calibration, embedding)
    streams = make_streams(first, ranks, tokens.evaluation, embedding, backend)
    contenders = []
    for index, of_recipe in enumerate(prepared):
        own: Streams = streams if index == 0 else streams.beside()
        contenders.append(
            Contender(
                of_recipe,
                LayerPacker(job.architecture, job.dims, ranks, config.compare_to_max, backend),
                InSweep(
                    job.architecture,
                    job.dims,
                    ranks,
                    own,
                    backend,
                    describe_evaluation(config),
                    first.dtype,
                ),
            )
        )
    return contenders, slots, store


def _visit_layers(
    config: CompareConfig,
    contenders: Sequence[Contender],
    ranks: Ranks,
    slots: Mapping[LayerType, LayerSlot],
    store: HiddenStore,
) -> None:
    first = contenders[0].prepared
    schedules = first.job.schedules
    requests = [requests_of(first.job, s, ranks.rank, all_shards=True) for s in schedules]
    largest = max(rank.read_ahead_gb for rank in first.plan.per_rank)
    reading = Reading(
        config.cast, config.read_threads, round((config.read_ahead_gb or largest) * 1e9)
    )
    feed = make_feed(first.source, requests, ranks.device, reading)
    progress = Progress(
        len(schedules),
        store.tokens,
        ranks.device,
        interval_s=config.progress_seconds,
        enabled=ranks.rank == 0,
    )
    streams, originals = contenders[0].evaluation.streams, Originals(ranks.device)
    with SlotFiller(schedules, requests, slots, feed, ranks.device) as filler:
        for schedule in schedules:
            filler.take()
            slot = slots[schedule.layer_type]
            observed = _observe(contenders, schedule.layer, slot, store, ranks)
            streams.bf16(slot)
            originals.keep(slot, [c.prepared.job.schedules[schedule.layer] for c in contenders])
            for number, contender in enumerate(contenders):
                if number:
                    originals.restore()
                contender.visit(config, schedule.layer, slot, observed)
            streams.end_layer()
            filler.release(schedule.layer_type, [Mark(ranks.device)])
            progress.layer_done(schedule.layer, schedule.layer_type, phase="compare")


def _observe(
    contenders: Sequence[Contender],
    layer: int,
    slot: LayerSlot,
    store: HiddenStore,
    ranks: Ranks,
) -> dict[str, torch.Tensor]:
    """Moves the calibration text through the layer; returns what all recipes ask about it."""
    job = contenders[0].prepared.job
    schedules: list[LayerSchedule] = [c.prepared.job.schedules[layer] for c in contenders]
    names = tuple(dict.fromkeys(name for schedule in schedules for name in schedule.observed))
    experts = job.architecture.n_routed_experts if schedules[0].layer_type is LayerType.moe else 0
    observer = LayerObserver(names, experts, ranks.device)

    def forward(batch: MicroBatch) -> torch.Tensor:
        observer.begin_batch(batch.weights, batch.hidden.shape[0])
        return slot.forward(batch.hidden, observer)

    store.update(forward)
    statistics = observer.statistics()
    reduced = ReducedStatistics(statistics, ranks.world).values()
    refuse_nonfinite(statistics, reduced, layer, ranks)
    return reduced


def _report(
    config: CompareConfig,
    contenders: Sequence[Contender],
    ranks: Ranks,
    phases: Mapping[str, float],
) -> list[RunReport] | None:
    first = contenders[0].prepared
    head = read_head(first.job, first.source).to(ranks.device)
    reports = []
    for contender in contenders:
        begun = time.monotonic()
        evaluation = contender.evaluation.finish(head)
        packed = {layer: part for layer, (part, _) in contender.parts.items()}
        everyone = gather_objects(packed, ranks.world)
        contender.seconds += time.monotonic() - begun
        if ranks.rank:
            continue
        records: dict[int | str, LayerRecord] = {}
        for layer, (_, told) in contender.parts.items():
            parts = [
                PartRecord(f"rank{rank:05d}", (), of_rank[layer])
                for rank, of_rank in enumerate(everyone)
            ]
            records[layer] = LayerRecord(layer, (*parts, PartRecord(SCALARS, (), told)))
        counted: dict[str, object] = {"comparison": "nothing was written"}
        report = build_report(contender.prepared, records, audit=counted)
        report.output, report.evaluation = config.output, evaluation
        report.phases = {**phases, "this recipe": contender.seconds}
        reports.append(report)
    return None if ranks.rank else reports
