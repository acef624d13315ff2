"""The whole job on one rank: check, plan, sweep, publish, audit, report.

In: the configuration and this process's place among the ranks. Out: the finished checkpoint
directory and its report. Everything that can be refused without reading weights is refused before
the ranks connect; everything after that can be started again with the same command.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import __version__
from pipeline.architecture import Architecture
from pipeline.calibration.data import check_token_ids, load_sequences
from pipeline.calibration.hidden import HiddenStore
from pipeline.calibration.loss import check_loss
from pipeline.calibration.token_file import is_token_file, load_token_file
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.publish import WorkDirectory, check_output, prepare
from pipeline.checkpoint.source import Source, open_source
from pipeline.checkpoint.source_check import SourceCheck, check_source
from pipeline.config import CalibrateConfig, ComputeDtype, Device, data_sources
from pipeline.errors import ConfigError, LayersweepError
from pipeline.job import Job, StoredTensor, build_job, find_refusals
from pipeline.packing import LayerPacker
from pipeline.plan import Plan, make_plan
from pipeline.publication import publish_run
from pipeline.recipe import load_recipe
from pipeline.report.records import RunReport
from pipeline.runtime.collectives import Ranks, barrier, broadcast_object
from pipeline.runtime.progress import Progress
from pipeline.sweep import LOSS, SCALARS, Sweep, SweepSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where this process stands, as the launcher says.

    Attributes:
        rank: Among all ranks.
        world: Number of ranks.
        local_rank: Among those of this node.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0


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
    phases: dict[str, float] = {}
    clock = time.monotonic()
    source, _, job = prepare_job(config, conf_dir, place)
    device, dtype = _device(config, place), _compute_dtype(config, place)
    plan = make_plan(
        job,
        num_sequences=config.calibration.num_sequences,
        seq_len=config.calibration.seq_len,
        compute_bytes=dtype.itemsize,
    )
    refusals = find_refusals(job, config.calibration.seq_len)
    if refusals:
        raise _join(refusals)
    work = check_output(Path(config.output), source.directory)
    if place.rank == 0:
        _announce(plan, config, source, work)
    forward = job.resolution.needs_forward
    token_ids = _load_tokens(config, conf_dir, source, job) if forward and not place.rank else None
    ranks, groups = _connect(config, job, place, device)
    if forward:
        token_ids = broadcast_object(token_ids, ranks.world)
    journal = Journal(work.journal, work.files)
    if place.rank == 0:
        prepare(work)
        if journal.start(_fingerprint(config, source, job, token_ids, dtype)):
            logger.info("going on with the unfinished run in %s", work.root)
    barrier(ranks.world)
    phases["prepare"], clock = time.monotonic() - clock, time.monotonic()
    sweep = _make_sweep(config, source, job, journal, work, ranks, groups, token_ids, dtype)
    sweep.run()
    if forward:
        sweep.measure_loss(config.calibration.loss_sequences)
    phases["sweep"], clock = time.monotonic() - clock, time.monotonic()
    barrier(ranks.world)
    if place.rank != 0:
        return None
    if forward and (record := journal.committed(LOSS)):
        loss = next(p.statistics for p in record.parts if p.part == SCALARS)
        check_loss(loss["loss"], loss["unigram_loss"], allow_bad_loss=config.allow_bad_loss)
    return publish_run(
        job,
        plan,
        source,
        journal,
        work,
        compute=f"{str(dtype).removeprefix('torch.')} on {device.type}",
        resolved_config=resolved_config,
        phases=phases,
    )


def prepare_job(
    config: CalibrateConfig, conf_dir: Path, place: Place
) -> tuple[Source, SourceCheck, Job]:
    """Opens and checks the source and decides the job; reads headers only.

    Raises:
        LayersweepError: The source, config.json, recipe or degrees cannot be used.
    """
    source = open_source(config.checkpoint)
    architecture = Architecture.from_hf_config(source.config)
    checked = check_source(source, architecture, cast=config.cast)
    recipe = load_recipe(config.recipe, conf_dir / "recipe")
    dims = config.parallel.dims(place.world, architecture.n_routed_experts)
    job = build_job(architecture, dims, recipe, stored_tensors(source, checked))
    return source, checked, job


def stored_tensors(source: Source, checked: SourceCheck) -> dict[str, StoredTensor]:
    """The source's tensors by logical name."""
    stored = {}
    for spec in checked.specs:
        info = source.tensors[checked.source_name(spec)]
        stored[spec.name] = StoredTensor(info.name, info.dtype, tuple(info.shape))
    for name in checked.mtp:
        info = source.tensors[name]
        stored[name] = StoredTensor(info.name, info.dtype, tuple(info.shape))
    return stored


def _make_sweep(
    config: CalibrateConfig,
    source: Source,
    job: Job,
    journal: Journal,
    work: WorkDirectory,
    ranks: Ranks,
    groups: Any,
    token_ids: torch.Tensor | None,
    dtype: torch.dtype,
) -> Sweep:
    slots, store, tokens = None, None, 0
    if token_ids is not None:
        from pipeline.mcore.slots import build_slots

        slots = build_slots(
            job.architecture,
            job.dims,
            ranks.rank,
            groups,
            device=ranks.device,
            compute_dtype=dtype,
            seq_len=token_ids.shape[1],
        )
        embedding = source.read(job.stored["backbone.embeddings.weight"].name)
        store = HiddenStore(
            token_ids,
            embedding,
            job.dims,
            ranks.rank,
            micro_batch=config.calibration.micro_batch,
            dtype=dtype,
            device=ranks.device,
        )
        tokens = token_ids.numel()
    return Sweep(
        job=job,
        source=source,
        journal=journal,
        files=work.files,
        ranks=ranks,
        packer=LayerPacker(job.architecture, job.dims, ranks, config.compare_to_max),
        slots=slots,
        store=store,
        settings=SweepSettings(
            clamp_kv_scales=config.clamp_kv_scales,
            unobserved_input_scale=config.unobserved_input_scale,
            max_shard_bytes=int(config.max_shard_gb * 1e9),
            cast=config.cast,
        ),
        progress=Progress(
            len(job.schedules),
            tokens,
            ranks.device,
            interval_s=config.progress_seconds,
            enabled=ranks.rank == 0,
        ),
    )


def _connect(
    config: CalibrateConfig, job: Job, place: Place, device: torch.device
) -> tuple[Ranks, Any]:
    """Process groups; a single rank without a forward pass needs none."""
    if place.world == 1 and not job.resolution.needs_forward:
        return Ranks(None, None, None, device), None
    from pipeline.mcore import backend

    groups = backend.start(job.dims, place.rank, device, timeout_s=60.0 * config.timeout_minutes)
    return Ranks(groups.world, groups.tp, groups.etp, device), groups


def _load_tokens(config: CalibrateConfig, conf_dir: Path, source: Source, job: Job) -> torch.Tensor:
    """Calibration token ids [num_sequences, seq_len], checked against the vocabulary."""
    size = config.calibration
    if isinstance(config.data, str) and is_token_file(config.data):
        ids = load_token_file(config.data, size.num_sequences, size.seq_len)
    else:
        ids = load_sequences(
            data_sources(config.data, conf_dir / "data"),
            source.directory,
            num_sequences=size.num_sequences,
            seq_len=size.seq_len,
            seed=size.seed,
        )
    check_token_ids(ids, job.architecture.vocab_size)
    return ids


def _device(config: CalibrateConfig, place: Place) -> torch.device:
    on_gpu = config.device is Device.cuda
    if config.device is Device.auto:
        on_gpu = torch.cuda.is_available()
    if not on_gpu:
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            "device",
            value=f"{torch.cuda.device_count()} GPUs for local rank {place.local_rank}",
            rule="every rank needs a GPU of its own",
            remedy="start fewer ranks on this node, or use device=cpu",
        )
    return torch.device("cuda", place.local_rank)


def _compute_dtype(config: CalibrateConfig, place: Place) -> torch.dtype:
    if config.compute_dtype is ComputeDtype.auto:
        return torch.float32 if _device(config, place).type == "cpu" else torch.bfloat16
    return torch.float32 if config.compute_dtype is ComputeDtype.float32 else torch.bfloat16


def _fingerprint(
    config: CalibrateConfig,
    source: Source,
    job: Job,
    token_ids: torch.Tensor | None,
    dtype: torch.dtype,
) -> Mapping[str, Any]:
    """Everything that the output depends on; the layout is not among it."""
    data = "" if token_ids is None else hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()
    return {
        "layersweep": __version__,
        "source": _source_digest(source),
        "recipe": job.recipe.digest,
        "calibration_tokens": data,
        "loss_sequences": config.calibration.loss_sequences,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "clamp_kv_scales": config.clamp_kv_scales,
        "unobserved_input_scale": config.unobserved_input_scale,
        "compare_to_max": config.compare_to_max,
        "cast": config.cast,
    }


def _source_digest(source: Source) -> str:
    """Digest of config.json, and of name, size, first and last 64 KiB of every weight file."""
    digest = hashlib.sha256((source.directory / "config.json").read_bytes())
    for path in sorted({info.path for info in source.tensors.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(65536))
            file.seek(max(0, size - 65536), os.SEEK_SET)
            digest.update(file.read(65536))
    return digest.hexdigest()


def _announce(plan: Plan, config: CalibrateConfig, source: Source, work: WorkDirectory) -> None:
    logger.info("source  %s", source.directory)
    logger.info("recipe  %s; %s", plan.recipe, plan.layout)
    logger.info(
        "plan    %.1f GB -> %.1f GB, %.2f effective bits, %s",
        plan.bf16_bytes / 1e9,
        plan.quantized_bytes / 1e9,
        plan.effective_bits,
        f"{config.calibration.num_sequences} x {config.calibration.seq_len} calibration tokens"
        if plan.needs_forward
        else "no forward pass needed",
    )
    for pattern in plan.unmatched_patterns:
        logger.warning("the recipe's pattern %r matches nothing in this model", pattern)
    for note in plan.notes:
        logger.warning("%s", note)
    logger.info("output  %s (work directory %s)", work.final, work.root)


def _join(refusals: list[LayersweepError]) -> LayersweepError:
    """One error for all refusals, so that a user mends them together."""
    if len(refusals) == 1:
        return refusals[0]
    joined = LayersweepError(f"{len(refusals)} reasons not to start")
    joined.args = ("\n  - ".join([joined.what, *(str(error) for error in refusals)]),)
    return joined
