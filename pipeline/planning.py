"""Answering `launch.plan`: from options to the printed plan.

In: a `PlanConfig`. Out: a table or JSON on standard output, and the exit status. Refusals are part
of the answer: they are collected and shown together with whatever could still be planned.
"""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.architecture import Architecture
from pipeline.checkpoint.source import open_source
from pipeline.checkpoint.source_check import check_source
from pipeline.config import ComputeDtype, PlanConfig, PlanOutput
from pipeline.errors import LayersweepError
from pipeline.job import StoredTensor, build_job, estimate_stored
from pipeline.memory import MemoryWish
from pipeline.model_config import read_model_config
from pipeline.plan import Plan, make_plan
from pipeline.preparation import stored_tensors
from pipeline.recipe import load_recipe
from pipeline.report.plan_table import print_json, print_plan


def show_plan(config: PlanConfig, conf_dir: Path) -> int:
    """Prints the plan; returns 2 if the job would be refused, else 0.

    Raises:
        LayersweepError: Nothing can be planned: an unknown model or recipe, a broken config.json,
            degrees that do not multiply, or a recipe that cannot be used on this model.
    """
    try:
        plan = plan_of(config, conf_dir)
    except LayersweepError as error:
        if config.output is PlanOutput.json:
            print_json({"refusals": [str(error)]})
            return 2
        raise
    if config.output is PlanOutput.json:
        print_json(plan.to_json())
    else:
        print_plan(plan)
    return 2 if plan.refusals else 0


def plan_of(config: PlanConfig, conf_dir: Path) -> Plan:
    """The plan of a checkpoint or of a known shape.

    Raises:
        LayersweepError: Nothing can be planned.
    """
    refusals: list[LayersweepError] = []
    architecture, stored = _read_model(config, conf_dir, refusals)
    recipe = load_recipe(config.recipe, conf_dir / "recipe")
    world = config.parallel.world
    if world is None:
        world = math.lcm(config.parallel.tp, config.parallel.etp * (config.parallel.ep or 1))
    dims = config.parallel.dims(world, architecture.n_routed_experts)
    job = build_job(architecture, dims, recipe, stored)
    return make_plan(
        job,
        num_sequences=config.calibration.num_sequences,
        seq_len=config.calibration.seq_len,
        compute_bytes=4 if config.compute_dtype is ComputeDtype.float32 else 2,
        memory=MemoryWish(
            config.calibration.micro_batch,
            config.hidden_store.value,
            None if config.device_gib is None else round(config.device_gib * 2**30),
            config.evaluation.num_sequences,
            config.evaluation.group_sequences,
            config.evaluation.group_seq_len,
        ),
        max_shard_bytes=int(config.max_shard_gb * 1e9),
        extra_refusals=refusals,
    )


def _read_model(
    config: PlanConfig, conf_dir: Path, refusals: list[LayersweepError]
) -> tuple[Architecture, dict[str, StoredTensor]]:
    if config.checkpoint is not None:
        source = open_source(config.checkpoint)
        architecture = Architecture.from_hf_config(source.config)
        try:
            return architecture, stored_tensors(
                source, check_source(source, architecture, cast=config.cast)
            )
        except LayersweepError as error:
            refusals.append(error)
            return architecture, estimate_stored(architecture)
    assert config.model is not None
    architecture = Architecture.from_hf_config(read_model_config(config.model, conf_dir))
    return architecture, estimate_stored(architecture)
