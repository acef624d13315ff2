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

from pipeline.assembly import (
    agree_on_memory,
    connect,
    make_evaluation,
    make_slots,
    make_snapshots,
)
from pipeline.calibration.loss import check_loss
from pipeline.checkpoint.attempts import Attempts
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.lock import WorkLock
from pipeline.checkpoint.publish import prepare
from pipeline.checkpoint.source import FileSource
from pipeline.checkpoint.staging import StagingRing
from pipeline.commits import ScalarSettings
from pipeline.config import CalibrateConfig
from pipeline.packing import LayerPacker
from pipeline.preflight import Preflight
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
from pipeline.runtime.guard import Guard, Limits
from pipeline.runtime.launcher import slurm_job
from pipeline.runtime.life import Phase
from pipeline.runtime.progress import Progress
from pipeline.source_verification import verify_source
from pipeline.sweep import LOSS, Sweep, SweepSettings
from pipeline.tokens import TokenIds, load_tokens

__all__ = ["Place", "calibrate", "make_guard"]

logger = logging.getLogger(__name__)


def calibrate(
    config: CalibrateConfig,
    conf_dir: Path,
    place: Place,
    resolved_config: str,
    guard: Guard | None = None,
) -> RunReport | None:
    """Runs the job; returns the report on rank 0.

    Args:
        config: What the user asked for.
        conf_dir: Directory of the presets (conf/).
        place: This process among the ranks.
        resolved_config: YAML of the configuration, saved beside the checkpoint.
        guard: Entered, and of this run alone; None makes one, which hears no signals.

    Raises:
        LayersweepError: Anything a user can cause.
        StoppedError: The run was asked to stop; the same command goes on.
    """
    if guard is None:
        with make_guard(config, place) as guard:
            return calibrate(config, conf_dir, place, resolved_config, guard)
    clock = time.monotonic()
    preflight = Preflight(place, conf_dir, answer_s=60.0 * config.timeout_minutes)
    with preflight.sharing():
        prepared = prepare_run(config, conf_dir, place)
    try:
        with preflight.sharing():
            tokens = _load_tokens(config, conf_dir, place, prepared)
        preflight.check_run(config, prepared)
        with guard.telling():
            return _run(config, place, prepared, tokens, resolved_config, clock, guard)
    finally:
        prepared.ahead.stop()


def make_guard(config: CalibrateConfig, place: Place, *, owns_process: bool = False) -> Guard:
    """What guards a run.

    Args:
        config: Says how long is waited.
        place: This process among the ranks.
        owns_process: Whether the process is there for this run alone.
    """
    limits = Limits(config.failure_seconds, 60.0 * config.stall_minutes, config.stop_seconds)
    return Guard(place.rank, limits, owns_process=owns_process, rehearses=config.discards_output)


def _load_tokens(
    config: CalibrateConfig, conf_dir: Path, place: Place, prepared: Prepared
) -> TokenIds | None:
    """The text of a run that needs any; on rank 0, which hands it to the others."""
    if place.rank or not prepared.job.resolution.needs_forward:
        return None
    return load_tokens(config, conf_dir, prepared.source, prepared.job.architecture.vocab_size)


def _run(
    config: CalibrateConfig,
    place: Place,
    prepared: Prepared,
    tokens: TokenIds | None,
    resolved_config: str,
    clock: float,
    guard: Guard,
) -> RunReport | None:
    forward = prepared.job.resolution.needs_forward
    ranks, groups = connect(config, prepared, place, forward=forward)
    guard.connect(ranks)
    prepared = agree_on_memory(prepared, ranks)
    if forward:
        tokens = broadcast_object(tokens, ranks.world)
    journal = Journal(prepared.work.journal, prepared.work.files, discard=config.discards_output)
    with WorkLock(prepared.work) if place.rank == 0 else nullcontext(), guard.telling():
        attempts = Attempts(prepared.work)
        if place.rank == 0:
            _begin(config, prepared, journal, tokens, attempts, guard)
        attempt = broadcast_object(attempts.number, ranks.world)
        guard.settle(prepared.work.state, prepared.work.stop, attempt, attempts.end)
        if config.verify_source and isinstance(prepared.source, FileSource):
            with guard.life.during(Phase.read):
                verify_source(prepared.source, ranks, config.read_threads, config.progress_seconds)
        phases = {"prepare": time.monotonic() - clock}
        _sweep(config, prepared, journal, ranks, groups, tokens, phases, guard)
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
            attempts=attempts,
            guard=guard,
        )


def _begin(
    config: CalibrateConfig,
    prepared: Prepared,
    journal: Journal,
    tokens: TokenIds | None,
    attempts: Attempts,
    guard: Guard,
) -> None:
    """Makes the work directory this run's; rank 0 does it."""
    prepare(prepared.work)
    calibration = None if tokens is None else tokens.calibration
    goes_on = journal.start(fingerprint(config, prepared, calibration))
    facts = {"world": prepared.job.dims.world, "hosts": guard.hosts}
    last = attempts.begin({**facts, "layout": prepared.plan.layout, **slurm_job()})
    if goes_on:
        logger.info(
            "going on with the unfinished run in %s (attempt %d%s)",
            prepared.work.root,
            attempts.number,
            f"; the last one: {last}" if last else "",
        )


def _sweep(
    config: CalibrateConfig,
    prepared: Prepared,
    journal: Journal,
    ranks: Ranks,
    groups: Any,
    tokens: TokenIds | None,
    phases: dict[str, float],
    guard: Guard,
) -> None:
    """Visits every layer and measures the loss; metrics.jsonl grows meanwhile."""
    clock = time.monotonic()
    memory, staging = prepared.plan.memory, None
    assert memory is not None
    if ranks.device.type == "cuda":
        staging = StagingRing(memory.staging, pinned=True)
    prepared.ahead.wait()  # also for its device memory
    barrier(ranks.world)  # every rank of a node finds the kernels
    sweep = _make_sweep(config, prepared, journal, ranks, groups, tokens, guard)
    sweep.staging = staging
    phases["set up"], clock = time.monotonic() - clock, time.monotonic()
    with MetricsWriter(prepared.work.metrics) if ranks.rank == 0 else nullcontext() as metrics:
        sweep.progress.record = None if metrics is None else metrics.write
        sweep.run()
        phases["sweep"], clock = time.monotonic() - clock, time.monotonic()
        if tokens is not None:
            sweep.measure(config.calibration.loss_sequences)
    if ranks.rank != 0:
        guard.quiet()  # before rank 0 takes the directory away
    barrier(ranks.world)
    phases["measure"] = time.monotonic() - clock


def _check_loss(journal: Journal, *, allow_bad_loss: bool) -> None:
    record = journal.committed(LOSS)
    assert record is not None
    measured = record.summary
    check_loss(measured["loss"], measured["unigram_loss"], allow_bad_loss=allow_bad_loss)


def _make_sweep(
    config: CalibrateConfig,
    prepared: Prepared,
    journal: Journal,
    ranks: Ranks,
    groups: Any,
    tokens: TokenIds | None,
    guard: Guard,
) -> Sweep:
    job, memory, source = prepared.job, prepared.plan.memory, prepared.source
    assert memory is not None
    if isinstance(source, FileSource):
        source = source.recorded()  # a restart notices bytes that have changed
    slots, store, evaluation, snapshots = None, None, None, None
    backend = packing_backend(config, ranks.device)
    count = 0
    if tokens is not None:
        count = tokens.calibration.numel()
        embedding = source.read(job.stored["backbone.embeddings.weight"].name)
        embedding = embedding.to(ranks.device)
        slots, store = make_slots(prepared, ranks, groups, tokens.calibration, embedding)
        if len(tokens.evaluation):
            evaluation = make_evaluation(config, prepared, ranks, tokens.evaluation, embedding)
        if not config.discards_output:
            snapshots = make_snapshots(config, prepared, ranks, tokens, store, evaluation)
    largest = max(rank.read_ahead_gb for rank in prepared.plan.per_rank)
    return Sweep(
        job=job,
        source=source,
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
        life=guard.life,
        stop=guard.stop,
        telling=guard.telling,
        snapshots=snapshots,
    )
