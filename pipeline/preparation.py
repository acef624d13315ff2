"""Everything that is decided and checked before the ranks connect.

In: the configuration and this process's place. Out: a `Prepared` run: the opened source, the job,
the plan and the work directory; also the calibration tokens and the fingerprint. Only headers,
configs and calibration text are read here, and everything that can be refused without reading
weights is refused here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import __version__
from pipeline.architecture import Architecture
from pipeline.checkpoint.publish import WorkDirectory, check_output
from pipeline.checkpoint.rehearsal import check_rehearsal
from pipeline.checkpoint.source import FileSource, Source, open_source
from pipeline.checkpoint.source_check import SourceCheck, check_source
from pipeline.checkpoint.synthetic import SyntheticSource
from pipeline.compile_ahead import CompileAhead
from pipeline.config import CalibrateConfig, Kernels
from pipeline.devices import choose_device, choose_dtype
from pipeline.errors import ConfigError, LayersweepError
from pipeline.job import Job, StoredTensor, build_job, estimate_stored, find_refusals
from pipeline.memory import MemoryWish
from pipeline.model_config import read_model_config
from pipeline.plan import Plan, make_plan
from pipeline.recipe import load_recipe
from pipeline.report.plan_table import describe_unmatched
from pipeline.report.summary import format_bytes

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


@dataclass(frozen=True)
class Prepared:
    """A run that may start.

    Attributes:
        source: Opened and checked.
        job: What was decided.
        plan: What it promises.
        work: Where it works, and what it will publish.
        device: Of this rank.
        dtype: Compute dtype of the forward pass.
        ahead: Compiles kernels meanwhile.
    """

    source: Source
    job: Job
    plan: Plan
    work: WorkDirectory
    device: torch.device
    dtype: torch.dtype
    ahead: CompileAhead = field(default_factory=CompileAhead)


def prepare_run(config: CalibrateConfig, conf_dir: Path, place: Place) -> Prepared:
    """Opens and checks the source, decides the job, and refuses what cannot work.

    Raises:
        LayersweepError: The source, config.json, recipe, degrees, device or output cannot be used.
    """
    device = _device(config, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # first: Model Optimizer's import opens a CUDA context
    opened = open_checkpoint(config, conf_dir, device)
    work = _check_output(config, opened.source)
    ahead = _compile_ahead(config, opened, place, device)
    try:
        prepared = decide(config, conf_dir, opened, work, place, device, ahead)
        if place.rank == 0:
            _announce(prepared, config)
    except BaseException:
        ahead.stop()
        raise
    return prepared


def prepare_several(
    config: CalibrateConfig, recipes: Sequence[str], conf_dir: Path, place: Place
) -> list[Prepared]:
    """`prepare_run` for several recipes on one source, which is opened once.

    Raises:
        LayersweepError: As `prepare_run`; the message names the recipe.
    """
    device = _device(config, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    opened = open_checkpoint(config, conf_dir, device)
    work = _check_output(config, opened.source)
    # One stream of each serving mode for every recipe.
    evaluation = dataclasses.replace(
        config.evaluation,
        num_sequences=config.evaluation.num_sequences * len(recipes),
        group_sequences=0,
    )
    options = {item.name: getattr(config, item.name) for item in fields(CalibrateConfig)}
    prepared = []
    for recipe in recipes:
        asked = CalibrateConfig(**{**options, "recipe": recipe, "evaluation": evaluation})
        prepared.append(decide(asked, conf_dir, opened, work, place, device, CompileAhead()))
    return prepared


def decide(
    config: CalibrateConfig,
    conf_dir: Path,
    opened: Opened,
    work: WorkDirectory,
    place: Place,
    device: torch.device,
    ahead: CompileAhead,
) -> Prepared:
    """The job and its plan.

    Raises:
        LayersweepError: Everything that is wrong with them.
    """
    if place.rank == 0:
        logger.info("source  %s", opened.source.location)
        logger.info("recipe  %s: importing Model Optimizer to read it", config.recipe)
    recipe = load_recipe(config.recipe, conf_dir / "recipe")
    dims = config.parallel.dims(place.world, opened.architecture.n_routed_experts)
    job = build_job(opened.architecture, dims, recipe, opened.stored)
    if job.resolution.needs_forward:
        backend = packing_backend(config, device)
        ahead.pack(
            job,
            compare_to_max=config.compare_to_max,
            backend=backend,
            evaluates=bool(config.evaluation.num_sequences),
        )
    else:
        ahead.stop()  # most of what it compiles would not be used
    refusals = find_refusals(job, config.calibration.seq_len)
    if job.resolution.needs_forward and config.data is None and not config.is_synthetic:
        refusals.append(
            ConfigError(
                "data",
                value="nothing",
                rule=f"recipe {recipe.name} calibrates activations, so it needs text",
                remedy="data=FILE, a directory or a Hub dataset; data=demo is Python source",
            )
        )
    if config.evaluation.has_gates and not job.resolution.needs_forward:
        refusals.append(
            ConfigError(
                "evaluation",
                value="gates",
                rule=f"recipe {recipe.name} needs no forward pass, so nothing is measured",
                remedy="leave them out, and give them to launch.evaluate afterwards",
            )
        )
    if refusals:
        raise _join(refusals)
    dtype, read_ahead = choose_dtype(config.compute_dtype, device), config.read_ahead_gb
    plan = make_plan(
        job,
        num_sequences=config.calibration.num_sequences,
        seq_len=config.calibration.seq_len,
        compute_bytes=dtype.itemsize,
        memory=_memory_wish(config, device),
        read_ahead_bytes=None if read_ahead is None else round(read_ahead * 1e9),
    )
    if plan.refusals:  # what the plan alone finds: it does not fit into the device
        raise LayersweepError("\n  - ".join(plan.refusals))
    return Prepared(opened.source, job, plan, work, device, dtype, ahead)


def packing_backend(config: CalibrateConfig, device: torch.device) -> str:
    """Name of what packs, of `pipeline.nvfp4.backends`."""
    if config.kernels is Kernels.auto:
        return "triton" if device.type == "cuda" else "reference"
    return str(config.kernels.value)


def stored_tensors(source: FileSource, checked: SourceCheck) -> dict[str, StoredTensor]:
    """The source's tensors by logical name."""
    stored = {}
    for spec in checked.specs:
        info = source.tensors[checked.source_name(spec)]
        stored[spec.name] = StoredTensor(info.name, info.dtype, tuple(info.shape))
    for name in checked.mtp:
        info = source.tensors[name]
        stored[name] = StoredTensor(info.name, info.dtype, tuple(info.shape))
    return stored


def fingerprint(
    config: CalibrateConfig, prepared: Prepared, token_ids: torch.Tensor | None
) -> Mapping[str, Any]:
    """Everything that the output depends on; the layout is not among it."""
    data = "" if token_ids is None else hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()
    return {
        "layersweep": __version__,
        "source": prepared.source.digest(),
        "recipe": prepared.job.recipe.digest,
        "calibration_tokens": data,
        "loss_sequences": config.calibration.loss_sequences,
        "compute_dtype": str(prepared.dtype).removeprefix("torch."),
        "clamp_kv_scales": config.clamp_kv_scales,
        "unobserved_input_scale": config.unobserved_input_scale,
        "compare_to_max": config.compare_to_max,
        "cast": config.cast,
    }


class Opened(NamedTuple):
    """The checkpoint, or made-up weights; its shape; its tensors by logical name."""

    source: Source
    architecture: Architecture
    stored: dict[str, StoredTensor]


def open_checkpoint(config: CalibrateConfig, conf_dir: Path, device: torch.device) -> Opened:
    """Opens and checks the source; made-up weights lie on `device`."""
    if not config.is_synthetic:
        source = open_source(config.checkpoint)
        architecture = Architecture.from_hf_config(source.config)
        checked = check_source(source, architecture, cast=config.cast)
        return Opened(source, architecture, stored_tensors(source, checked))
    assert config.model is not None
    values = read_model_config(config.model, conf_dir)
    architecture = Architecture.from_hf_config(values)
    stored = estimate_stored(architecture)
    seed = config.synthetic_seed
    made_up = SyntheticSource(config.model, values, stored, seed=seed, device=device)
    return Opened(made_up, architecture, stored)


def _compile_ahead(
    config: CalibrateConfig, opened: Opened, place: Place, device: torch.device
) -> CompileAhead:
    """One process for all ranks of a node: they share a home directory, hence a cache."""
    if device.type != "cuda" or place.local_rank:
        return CompileAhead()
    dims = config.parallel.dims(place.world, opened.architecture.n_routed_experts)
    return CompileAhead.start(
        opened.source.config,
        opened.stored,
        device=device,
        dtype=choose_dtype(config.compute_dtype, device),
        seq_len=config.calibration.seq_len,
        sums_in_fp32=dims.etp * dims.ep > 1,
        fills=config.is_synthetic,
    )


def _check_output(config: CalibrateConfig, source: Source) -> WorkDirectory:
    directory = source.directory if isinstance(source, FileSource) else None
    if config.discards_output:
        return check_rehearsal(config.report_directory, directory)
    return check_output(Path(config.output), directory)


def _device(config: CalibrateConfig, place: Place) -> torch.device:
    device = choose_device(config.device, place.local_rank)
    if config.kernels is Kernels.triton and device.type == "cpu":
        raise ConfigError(
            "kernels",
            value=config.kernels.value,
            rule="Triton kernels run on a GPU, and this run is on the CPU",
            remedy="leave kernels out, or use device=cuda",
        )
    return device


def _memory_wish(config: CalibrateConfig, device: torch.device) -> MemoryWish:
    size = None
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    return MemoryWish(
        config.calibration.micro_batch,
        config.hidden_store.value,
        size,
        config.evaluation.num_sequences,
        config.evaluation.group_sequences,
        config.evaluation.group_seq_len,
    )


def _announce(prepared: Prepared, config: CalibrateConfig) -> None:
    plan, work = prepared.plan, prepared.work
    logger.info("recipe  %s; %s", plan.recipe, plan.layout)
    logger.info(
        "plan    %s -> %s, %.2f effective bits, %s",
        format_bytes(plan.bf16_bytes),
        format_bytes(plan.quantized_bytes),
        plan.effective_bits,
        f"{config.calibration.num_sequences} x {config.calibration.seq_len} calibration tokens"
        if plan.needs_forward
        else "no forward pass needed",
    )
    if plan.unmatched_patterns:
        logger.warning("%s", describe_unmatched(plan.unmatched_patterns))
    for note in plan.notes:
        logger.warning("%s", note)
    if work.is_rehearsal:
        logger.info(
            "output  discarded: a rehearsal, which cannot be resumed; report %s", work.final
        )
    else:
        logger.info("output  %s (work directory %s)", work.final, work.root)


def _join(refusals: list[LayersweepError]) -> LayersweepError:
    """One error for all refusals, so that a user mends them together."""
    if len(refusals) == 1:
        return refusals[0]
    joined = LayersweepError(f"{len(refusals)} reasons not to start")
    joined.args = ("\n  - ".join([joined.what, *(str(error) for error in refusals)]),)
    return joined
