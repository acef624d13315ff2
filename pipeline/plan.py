"""The plan: formats, bytes, effective bits, memory per rank and refusals, before anything is read.

In: a `Job` and the calibration size. Out: a `Plan`, plain numbers. Pure arithmetic: it needs no
GPU and no weights, and the finished checkpoint must weigh exactly what it says.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pipeline.architecture import LayerType
from pipeline.errors import ConfigError, LayersweepError
from pipeline.job import Job, find_refusals
from pipeline.memory import MemoryPlan, MemoryWish, plan_memory
from pipeline.nvfp4.formats import BLOCK_SIZE, Format
from pipeline.plan_ranks import (
    GB,
    SCALAR_BYTES,
    RankPlan,
    layer_written_bytes,
    packed_bytes,
    plan_ranks,
    written_bytes,
)
from pipeline.recipe import ModuleFormat
from pipeline.snapshots import planned_bytes

HOPPER_K = 64


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Tensors of one role that get the same format."""

    role: str
    format: str
    method: str
    activations: str
    layers: int
    tensors: int
    parameters: int
    source_bytes: int
    stored_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole answer of `launch.plan`."""

    recipe: str
    layout: str
    layers: dict[str, int]
    parameters: int
    bf16_bytes: int
    quantized_bytes: int
    effective_bits: float
    needs_forward: bool
    kv_cache: str
    files: int
    groups: list[GroupPlan]
    per_rank: list[RankPlan]
    memory: MemoryPlan | None
    unmatched_patterns: list[str]
    notes: list[str]
    refusals: list[str]
    snapshot_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain mapping with sizes in GB, for scripts."""
        values = dataclasses.asdict(self)
        values["bf16_gb"] = self.bf16_bytes / GB
        values["quantized_gb"] = self.quantized_bytes / GB
        return values


def make_plan(
    job: Job,
    *,
    num_sequences: int,
    seq_len: int,
    compute_bytes: int,
    memory: MemoryWish | None = None,
    read_ahead_bytes: int | None = None,
    max_shard_bytes: int = 10**9,
    extra_refusals: list[LayersweepError] | None = None,
) -> Plan:
    """Plans one job.

    Args:
        job: What was decided.
        num_sequences: Calibration sequences in all.
        seq_len: Tokens of each.
        compute_bytes: Bytes per element of the compute dtype.
        memory: The device, and what the user fixed; None plans for a CPU.
        read_ahead_bytes: Of the read-ahead's host buffer; None means a rank's largest layer.
        max_shard_bytes: Largest file.
        extra_refusals: What was already found wrong with the source.
    """
    refusals = [*(extra_refusals or []), *find_refusals(job, seq_len)]
    groups = _groups(job)
    parameters = sum(group.parameters for group in groups)
    bits = sum(group.parameters * _bits(job, group) for group in groups)
    writes = written_bytes(job)
    layout_ok = not any(type(error).__name__ == "LayoutError" for error in refusals)
    tokens = (num_sequences, seq_len) if job.resolution.needs_forward else (0, 0)
    per_rank = plan_ranks(job, writes, compute_bytes) if layout_ok else []
    planned, snapshot = None, 0
    wish = memory or MemoryWish()
    if per_rank:
        snapshot = planned_bytes(job, tokens=tokens, compute_bytes=compute_bytes, wish=wish)
        try:
            planned = plan_memory(
                job,
                tokens=tokens,
                compute_bytes=compute_bytes,
                slots=round(max(rank.slot_gb for rank in per_rank) * GB),
                read_ahead=read_ahead_bytes or round(per_rank[0].read_ahead_gb * GB),
                wish=wish,
            )
        except ConfigError as error:
            refusals.append(error)
    return Plan(
        recipe=job.recipe.name,
        layout=job.dims.describe(),
        layers={kind.value: len(job.architecture.layers_of(kind)) for kind in LayerType},
        parameters=parameters,
        bf16_bytes=sum(tensor.nbytes for tensor in job.stored.values()),
        quantized_bytes=sum(group.stored_bytes for group in groups) + scalar_bytes(job),
        effective_bits=bits / parameters,
        needs_forward=job.resolution.needs_forward,
        kv_cache=_kv_cache(job),
        files=_files(job, max_shard_bytes),
        groups=groups,
        per_rank=per_rank,
        memory=planned,
        unmatched_patterns=job.resolution.unmatched_patterns,
        notes=_notes(job),
        refusals=[str(error) for error in refusals],
        snapshot_bytes=snapshot,
    )


def scalar_bytes(job: Job) -> int:
    """Bytes of all activation scalars: input_scale, k_scale and v_scale."""
    inputs = sum(
        1
        for module_format in job.resolution.formats.values()
        if module_format.is_quantized and module_format.input_format is not None
    )
    return SCALAR_BYTES * (inputs + 2 * len(job.resolution.kv))


def _groups(job: Job) -> list[GroupPlan]:
    """One row per role and format, in model order, what is copied last."""
    rows: dict[tuple[str, str, str, str], list[Any]] = {}
    for spec in job.specs:
        stored = job.stored[spec.name]
        module_format = job.resolution.formats.get(spec.module) if spec.is_linear_weight else None
        key = (spec.role.value, *describe_format(module_format, stored.dtype))
        size = stored.nbytes
        if module_format is not None and module_format.is_quantized:
            size = packed_bytes(spec, module_format)
        _add(rows, key, spec.layer, spec.parameters, stored.nbytes, size)
    for name, stored in job.stored.items():
        if name.startswith("mtp."):
            key = ("mtp", stored.dtype.lower(), "", "")
            _add(rows, key, None, stored.parameters, stored.nbytes, stored.nbytes)
    return [
        GroupPlan(*key, len(layers), tensors, parameters, source, stored_bytes)
        for key, (layers, tensors, parameters, source, stored_bytes) in rows.items()
    ]


def _add(
    rows: dict[tuple[str, str, str, str], list[Any]],
    key: tuple[str, str, str, str],
    layer: int | None,
    parameters: int,
    source_bytes: int,
    stored_bytes: int,
) -> None:
    row = rows.setdefault(key, [set(), 0, 0, 0, 0])
    if layer is not None:
        row[0].add(layer)
    for index, value in enumerate((1, parameters, source_bytes, stored_bytes), start=1):
        row[index] += value


def describe_format(module_format: ModuleFormat | None, dtype: str) -> tuple[str, str, str]:
    """Format, method and activations of a group, as the table shows them."""
    if module_format is None or not module_format.is_quantized:
        return dtype.lower(), "", ""
    if module_format.weight_method is not None:
        method = module_format.weight_method.value
    else:
        method = "mse" if module_format.fp8_multipliers else "max"
    inputs = "16-bit"
    if module_format.input_format is not None:
        inputs = module_format.input_format.value
        if module_format.constant_input_amax is not None:
            inputs += " (constant)"
    return module_format.weight_format.value, method, inputs


def _bits(job: Job, group: GroupPlan) -> float:
    """Stored weight bits per parameter: NVFP4 counts 4.5, FP8 8, the rest as stored."""
    fixed = {"nvfp4": 4 + 8 / BLOCK_SIZE, "fp8": 8.0}
    return fixed.get(group.format, 8 * group.source_bytes / group.parameters)


def _kv_cache(job: Job) -> str:
    if not job.resolution.kv:
        return "16-bit"
    constant = {kv.constant_amax for kv in job.resolution.kv.values()} - {None}
    return "fp8 (constant)" if constant else "fp8 (calibrated)"


def _files(job: Job, limit: int) -> int:
    """About how many shard files there will be: tensors are not cut to fill them to the limit."""
    files = sum(
        math.ceil(size / limit) for s in job.schedules for size in layer_written_bytes(job, s)
    )
    outer = [0] * job.dims.world
    for name, rank in job.outer:
        outer[rank] += job.stored[name].nbytes
    files += sum(math.ceil(size / limit) for size in outer)
    return files + (scalar_bytes(job) > 0)


def _notes(job: Job) -> list[str]:
    """What works but should be known before it is served."""
    narrow: dict[str, str] = {}
    for spec in job.specs:
        module_format = job.resolution.formats.get(spec.module)
        if module_format is None or module_format.weight_format is not Format.nvfp4:
            continue
        if spec.is_linear_weight and spec.shape[1] % HOPPER_K:
            kind = ".".join(part for part in spec.module.split(".") if not part.isdigit())
            narrow.setdefault(kind, f"{spec.module} has in_features {spec.shape[1]}")
    return [
        f"{text}: not a multiple of {HOPPER_K}, so Hopper (Marlin) cannot serve it"
        for text in narrow.values()
    ]
