"""Putting a run together: groups, slots, hidden states, streams.

In: what was decided, on every rank. Out: the objects that visit the layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.architecture import LayerType
from pipeline.calibration.hidden import HiddenStore
from pipeline.checkpoint.snapshot_files import unwritten_bytes
from pipeline.config import CalibrateConfig
from pipeline.evaluation.groups import GroupStreams
from pipeline.evaluation.in_sweep import InSweep
from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.streams import Streams
from pipeline.memory import smallest_plan
from pipeline.preparation import Place, Prepared, fingerprint, packing_backend
from pipeline.runtime.collectives import Ranks, broadcast_object, gather_objects
from pipeline.runtime.connecting import connecting
from pipeline.snapshots import Snapshots
from pipeline.tokens import TokenIds
from pipeline.weights import LayerSlot


def connect(
    config: CalibrateConfig, prepared: Prepared, place: Place, *, forward: bool
) -> tuple[Ranks, Any]:
    """Process groups; a single rank without a forward pass needs none."""
    job, device = prepared.job, prepared.device
    if place.world == 1 and not forward:
        return Ranks(None, None, None, device), None
    from pipeline.mcore import backend

    with connecting(place.rank, place.world):
        groups = backend.start(
            job.dims, place.rank, device, timeout_s=60.0 * config.timeout_minutes
        )
    return Ranks(groups.world, groups.tp, groups.etp, device), groups


def agree_on_memory(prepared: Prepared, ranks: Ranks) -> Prepared:
    """The plan of the rank with the least memory, for all: they must make the same calls."""
    plans = gather_objects(prepared.plan.memory, ranks.world)
    memory = broadcast_object(smallest_plan(plans), ranks.world)
    return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, memory=memory))


def make_slots(
    prepared: Prepared,
    ranks: Ranks,
    groups: Any,
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
) -> tuple[Mapping[LayerType, LayerSlot], HiddenStore]:
    """Empty slots, and the hidden states before the first layer."""
    from pipeline.mcore.slots import build_slots

    job, dtype, memory = prepared.job, prepared.dtype, prepared.plan.memory
    assert memory is not None
    store = HiddenStore(
        token_ids,
        embedding,
        job.dims,
        ranks.rank,
        micro_batch=memory.micro_batch,
        dtype=dtype,
        device=ranks.device,
        on_host=memory.hidden_on_host,
    )
    slots = build_slots(
        job.architecture,
        job.dims,
        ranks.rank,
        groups,
        device=ranks.device,
        compute_dtype=dtype,
        seq_len=token_ids.shape[1],
    )
    return slots, store


def make_streams(
    prepared: Prepared,
    ranks: Ranks,
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    backend: str,
) -> Streams:
    """The evaluation sequences before the first layer, in all serving modes."""
    job, memory = prepared.job, prepared.plan.memory
    assert memory is not None
    return Streams(
        token_ids,
        embedding,
        job.dims,
        ranks.rank,
        layers=len(job.schedules),
        micro_batch=memory.evaluated_at_a_time,
        dtype=prepared.dtype,
        device=ranks.device,
        modes=tuple(ServingMode),
        backend=backend,
    )


def describe_evaluation(config: CalibrateConfig) -> str:
    """Where the evaluation text comes from, in words."""
    if config.evaluation.data is not None:
        return f"{config.evaluation.data}"
    source = "random token ids" if config.data is None else f"{config.data}"
    return f"{source}, what follows the calibration text"


def make_evaluation(
    config: CalibrateConfig,
    prepared: Prepared,
    ranks: Ranks,
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
) -> InSweep:
    """What measures the layers on the way, with the groups that were asked for."""
    job, memory = prepared.job, prepared.plan.memory
    assert memory is not None
    backend = packing_backend(config, ranks.device)
    streams = make_streams(prepared, ranks, token_ids, embedding, backend)
    asked, groups = config.evaluation, None
    if asked.group_sequences:
        length = min(max(asked.group_seq_len, job.dims.tp), token_ids.shape[1])
        groups = GroupStreams(
            token_ids[: asked.group_sequences, : length - length % job.dims.tp].contiguous(),
            embedding,
            job.dims,
            ranks.rank,
            tokens_at_a_time=memory.evaluated_at_a_time * token_ids.shape[1],
            dtype=prepared.dtype,
            device=ranks.device,
            backend=backend,
            parameters=sum(tensor.parameters for tensor in job.stored.values()),
        )
    return InSweep(
        job.architecture,
        job.dims,
        ranks,
        streams,
        backend,
        describe_evaluation(config),
        prepared.dtype,
        groups,
    )


def make_snapshots(
    config: CalibrateConfig,
    prepared: Prepared,
    ranks: Ranks,
    tokens: TokenIds,
    store: HiddenStore,
    evaluation: InSweep | None,
) -> Snapshots:
    """What keeps the hidden states for a restart, under a key of all that they depend on."""
    job, memory, work = prepared.job, prepared.plan.memory, prepared.work
    assert memory is not None
    key = {
        "job": fingerprint(config, prepared, tokens.calibration) if ranks.rank == 0 else None,
        "evaluation": None if evaluation is None else evaluation.key,
        "layout": {name: getattr(job.dims, name) for name in ("world", "tp", "ep", "etp")},
        "micro_batch": [memory.micro_batch, memory.evaluated_at_a_time],
        "device": ranks.device.type,
    }
    return Snapshots(
        work.snapshots,
        key,
        ranks,
        config.snapshots,
        store,
        evaluation,
        job.schedules,
        unwritten=lambda: unwritten_bytes(work.files, prepared.plan.quantized_bytes),
        in_background=ranks.device.type == "cuda",
    )
