"""What each rank holds, reads and writes: the arithmetic behind the plan's second table.

In: a job and the calibration size. Out: bytes per rank. The finished files must weigh exactly
what `written_bytes` and the activation scalars add up to.
"""

from __future__ import annotations

import dataclasses
import math

from pipeline.architecture import LayerType, TensorSpec, layer_tensors
from pipeline.job import Job
from pipeline.nvfp4.formats import BLOCK_SIZE, Format
from pipeline.recipe import ModuleFormat
from pipeline.schedule import EXPERT_PROJECTIONS, LayerSchedule, expert_owner, packs_expert
from pipeline.sharding import shard_of

SCALAR_BYTES = 4
GB = 1e9


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """What one rank reads and writes, in GB (10^9 bytes)."""

    rank: int
    slot_gb: float
    read_ahead_gb: float
    reads_gb: float
    writes_gb: float


def plan_ranks(job: Job, writes: list[int], compute_bytes: int) -> list[RankPlan]:
    """One row per rank.

    Args:
        job: A job whose layout fits.
        writes: Bytes that each rank writes.
        compute_bytes: Bytes per element of the compute dtype.
    """
    dims = job.dims
    copied = [0] * dims.world
    for name, rank in job.outer:
        copied[rank] += job.stored[name].nbytes
    for schedule in job.schedules:
        for spec, rank in schedule.copies:
            copied[rank] += job.stored[spec.name].nbytes
    plans = []
    for rank in range(dims.world):
        if job.resolution.needs_forward:
            slots, reads, largest = _slot_bytes(job, rank, compute_bytes)
        else:
            sizes = [_streamed_bytes(job, schedule, rank) for schedule in job.schedules]
            slots, reads, largest = 0, sum(sizes), max(sizes)
        values = (slots, largest, reads + copied[rank], writes[rank])
        plans.append(RankPlan(rank, *(size / GB for size in values)))
    return plans


def packed_bytes(spec: TensorSpec, module_format: ModuleFormat) -> int:
    """Bytes of a quantized weight with its own scales (not the activation scalars)."""
    if module_format.weight_format is Format.fp8:
        return spec.parameters + SCALAR_BYTES
    return spec.parameters // 2 + spec.parameters // BLOCK_SIZE + SCALAR_BYTES


def written_bytes(job: Job) -> list[int]:
    """Bytes of tensors that each rank writes (without the activation scalars)."""
    written = [0] * job.dims.world
    for schedule in job.schedules:
        for rank, size in enumerate(layer_written_bytes(job, schedule)):
            written[rank] += size
    for name, rank in job.outer:
        written[rank] += job.stored[name].nbytes
    return written


def layer_written_bytes(job: Job, schedule: LayerSchedule) -> list[int]:
    """Bytes of one layer's tensors that each rank writes."""
    dims = job.dims
    written = [0] * dims.world
    for spec, rank in schedule.copies:
        written[rank] += job.stored[spec.name].nbytes
    for item in schedule.dense:
        rank = item.owner + dims.tp * item.replica
        written[rank] += packed_bytes(item.spec, item.module_format)
    if schedule.experts:
        local = job.architecture.n_routed_experts // dims.ep
        per_expert = sum(
            packed_bytes(_expert_spec(job, schedule.layer, projection), module_format)
            for projection, module_format in schedule.experts.items()
        )
        for rank in range(dims.world):
            at = dims.coordinates(rank)
            mine = sum(
                packs_expert(e, at, dims) and expert_owner(e, dims) == at.etp_rank
                for e in range(local)
            )
            written[rank] += mine * per_expert
    return written


def _expert_spec(job: Job, layer: int, projection: str) -> TensorSpec:
    specs = layer_tensors(job.architecture, layer)
    return specs[-2 + EXPERT_PROJECTIONS.index(projection)]


def _slot_bytes(job: Job, rank: int, compute_bytes: int) -> tuple[int, int, int]:
    """Bytes of all slots, of everything read into them, and of the largest layer read."""
    slots, reads, largest = 0, 0, 0
    for kind in LayerType:
        layers = job.architecture.layers_of(kind)
        if not layers:
            continue
        specs = layer_tensors(job.architecture, layers[0])
        slots += sum(_shard_parameters(job, spec, rank) for spec in specs) * compute_bytes
        local = sum(_shard_bytes(job, spec, rank) for spec in specs)
        reads += local * len(layers)
        largest = max(largest, local)
    return slots, reads, largest


def _streamed_bytes(job: Job, schedule: LayerSchedule, rank: int) -> int:
    """Bytes of one layer that a rank reads when nothing runs: only what it packs."""
    at = job.dims.coordinates(rank)
    size = sum(
        _shard_bytes(job, item.spec, rank) for item in schedule.dense if item.replica == at.dp_rank
    )
    if schedule.experts:
        local = job.architecture.n_routed_experts // job.dims.ep
        mine = sum(packs_expert(e, at, job.dims) for e in range(local))
        for projection in schedule.experts:
            spec = _expert_spec(job, schedule.layer, projection)
            size += mine * job.stored[spec.name].nbytes // job.dims.etp
    return size


def _shard_parameters(job: Job, spec: TensorSpec, rank: int) -> int:
    shard = shard_of(spec, job.architecture, job.dims, rank)
    return 0 if shard is None else math.prod(shard.shape)


def _shard_bytes(job: Job, spec: TensorSpec, rank: int) -> int:
    stored = job.stored[spec.name]
    return _shard_parameters(job, spec, rank) * stored.nbytes // stored.parameters
