"""The whole job on one rank: check, plan, sweep, publish, audit, report.

In: the configuration and this process's place among the ranks. Out: the finished checkpoint
directory and its report. Everything that can be refused without reading weights is refused before
the ranks connect; everything after that can be started again with the same command.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.assembly import agree_on_memory, connect, make_evaluation, make_slots
from pipeline.calibration.loss import check_loss
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.lock import WorkLock
from pipeline.checkpoint.publish import prepare
from pipeline.checkpoint.staging import StagingRing
from pipeline.commits import SCALARS, ScalarSettings
from pipeline.config import CalibrateConfig
from pipeline.packing import LayerPacker
from pipeline.preparation import (
    Place,
    Prepared,
    fingerprint,
    packing_backend,
    prepare_run,
)
from pipeline.publication import publish_rehearsal, publish_run
from pipeline.reading import Reading
from pipeline.report.metrics import MetricsWriter
from pipeline.report.records import RunReport
from pipeline.runtime.collectives import Ranks, barrier, broadcast_object
from pipeline.runtime.progress import Progress
from pipeline.sweep import LOSS, Sweep, SweepSettings
from pipeline.tokens import TokenIds, load_tokens

__all__ = ["Place", "calibrate"]

logger = logging.getLogger(__name__)


def calibrate(
    config: CalibrateConfig, conf_dir: Path, place: Place, resolved_config: str
) -> RunReport | None:
    """Runs the job; returns the report on rank 0.

    Args:
        config: What the user asked for.
        conf_dir: Directory of the presets (conf/).
        place: This process among the ranks.
        resolved_config: YAML of the configuration, saved beside the checkpoint.

    Raises:
        LayersweepError: Anything a user can cause.
    """
    clock = time.monotonic()
    prepared = prepare_run(config, conf_dir, place)
    try:
        return _run(config, conf_dir, place, prepared, resolved_config, clock)
    finally:
        prepared.ahead.stop()


def _run(
    config: CalibrateConfig,
    conf_dir: Path,
    place: Place,
    prepared: Prepared,
    resolved_config: str,
    clock: float,
) -> RunReport | None:
    forward = prepared.job.resolution.needs_forward
    tokens = None
    if forward and place.rank == 0:
        vocab_size = prepared.job.architecture.vocab_size
        tokens = load_tokens(config, conf_dir, prepared.source, vocab_size)
    ranks, groups = connect(config, prepared, place, forward=forward)
    prepared = agree_on_memory(prepared, ranks)
    if forward:
        tokens = broadcast_object(tokens, ranks.world)
    journal = Journal(prepared.work.journal, prepared.work.files, discard=config.discards_output)
    with WorkLock(prepared.work) if place.rank == 0 else nullcontext():
        if place.rank == 0:
            prepare(prepared.work)
            calibration = None if tokens is None else tokens.calibration
            if journal.start(fingerprint(config, prepared, calibration)):
                logger.info("going on with the unfinished run in %s", prepared.work.root)
        barrier(ranks.world)
        phases = {"prepare": time.monotonic() - clock}
        _sweep(config, prepared, journal, ranks, groups, tokens, phases)
        if place.rank != 0:
            return None
        if forward:
            # The loss of made-up weights says nothing.
            _check_loss(journal, allow_bad_loss=config.allow_bad_loss or config.is_synthetic)
        publish = publish_rehearsal if config.discards_output else publish_run
        return publish(
            prepared,
            journal,
            resolved_config=resolved_config,
            phases=phases,
            asked=config.evaluation,
        )


def _sweep(
    config: CalibrateConfig,
    prepared: Prepared,
    journal: Journal,
    ranks: Ranks,
    groups: Any,
    tokens: TokenIds | None,
    phases: dict[str, float],
) -> None:
    """Visits every layer and measures the loss; metrics.jsonl grows meanwhile."""
    clock = time.monotonic()
    memory, staging = prepared.plan.memory, None
    assert memory is not None
    if ranks.device.type == "cuda":
        staging = StagingRing(memory.staging, pinned=True)
    prepared.ahead.wait()  # also for its device memory
    barrier(ranks.world)  # every rank of a node finds the kernels
    sweep = _make_sweep(config, prepared, journal, ranks, groups, tokens)
    sweep.staging = staging
    phases["set up"], clock = time.monotonic() - clock, time.monotonic()
    with MetricsWriter(prepared.work.metrics) if ranks.rank == 0 else nullcontext() as metrics:
        sweep.progress.record = None if metrics is None else metrics.write
        sweep.run()
        phases["sweep"], clock = time.monotonic() - clock, time.monotonic()
        if tokens is not None:
            sweep.measure(config.calibration.loss_sequences)
    barrier(ranks.world)
    phases["measure"] = time.monotonic() - clock


def _check_loss(journal: Journal, *, allow_bad_loss: bool) -> None:
    record = journal.committed(LOSS)
    assert record is not None
    measured = next(part.statistics for part in record.parts if part.part == SCALARS)
    check_loss(measured["loss"], measured["unigram_loss"], allow_bad_loss=allow_bad_loss)


def _make_sweep(
    config: CalibrateConfig,
    prepared: Prepared,
    journal: Journal,
    ranks: Ranks,
    groups: Any,
    tokens: TokenIds | None,
) -> Sweep:
    job, memory = prepared.job, prepared.plan.memory
    assert memory is not None
    slots, store, evaluation = None, None, None
    backend = packing_backend(config, ranks.device)
    count = 0
    if tokens is not None:
        count = tokens.calibration.numel()
        embedding = prepared.source.read(job.stored["backbone.embeddings.weight"].name)
        embedding = embedding.to(ranks.device)
        slots, store = make_slots(prepared, ranks, groups, tokens.calibration, embedding)
        if len(tokens.evaluation):
            evaluation = make_evaluation(config, prepared, ranks, tokens.evaluation, embedding)
    largest = max(rank.read_ahead_gb for rank in prepared.plan.per_rank)
    return Sweep(
        job=job,
        source=prepared.source,
        journal=journal,
        files=prepared.work.files,
        ranks=ranks,
        packer=LayerPacker(job.architecture, job.dims, ranks, config.compare_to_max, backend),
        slots=slots,
        store=store,
        settings=SweepSettings(
            scalars=ScalarSettings(config.clamp_kv_scales, config.unobserved_input_scale),
            max_shard_bytes=int(config.max_shard_gb * 1e9),
            reading=Reading(
                config.cast,
                config.read_threads,
                round((config.read_ahead_gb or largest) * 1e9),
            ),
            discard=config.discards_output,
            write_threads=config.write_threads,
        ),
        progress=Progress(
            len(job.schedules),
            count,
            ranks.device,
            interval_s=config.progress_seconds,
            enabled=ranks.rank == 0,
        ),
        evaluation=evaluation,
    )
