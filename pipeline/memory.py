"""How much memory a rank takes, and what follows: micro-batch, and where hidden states stay.

In: a job, the calibration size, the device's memory. Out: a `MemoryPlan`, plain numbers. The sums
follow what the layers hold at their widest point (`pipeline/mcore`); the peak that a run measures
must lie within 5 % of what is said here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from pipeline.architecture import Architecture, LayerType, TensorSpec
from pipeline.blocks import expert_spec, experts_per_chunk
from pipeline.errors import ConfigError
from pipeline.evaluation.groups import groups_of
from pipeline.evaluation.records import ServingMode
from pipeline.job import Job
from pipeline.nvfp4.formats import BLOCK_SIZE, Format
from pipeline.plan_ranks import layer_written_bytes
from pipeline.recipe import ModuleFormat
from pipeline.schedule import LayerSchedule
from pipeline.sharding import ParallelDims

LARGEST_MICRO_BATCH_TOKENS = 32768
"""Where a micro-batch stops getting faster: every expert of 512 then sees about 1,400 rows."""

SCAN_ELEMENTS = 2**27
"""Inputs that the state space scan takes at a time (`pipeline/mcore/mamba.py`)."""

FEWEST_TOKENS_ON_DEVICE = 8192
"""With less room than this beside resident hidden states, they go to the host."""

RESERVED_BYTES = 2 * 2**30
"""CUDA context, NCCL's buffers, libraries' workspaces: memory that no allocation of ours shows."""

IMBALANCE = 0.5
"""How many more rows than the mean one rank may get, times the root of its number of experts.

The trained demo model's most loaded rank got 1.05 of the mean with 8 of 16 experts, 1.12 with 4 and
1.27 with 2.
"""

FRAGMENTATION = 0.03
"""Share of the device that the allocator may lose to rounding."""


@dataclasses.dataclass(frozen=True)
class MemoryWish:
    """What the user fixed, and what there is.

    Attributes:
        micro_batch: Sequences per forward call; None lets the plan choose.
        hidden_store: auto, device or host.
        device_bytes: Memory of a rank's device; None on a CPU.
        evaluated: Evaluation sequences.
        group_sequences: Of them, how many pass with each group of projections quantized alone.
        group_seq_len: Tokens of those.
    """

    micro_batch: int | None = None
    hidden_store: str = "auto"
    device_bytes: int | None = None
    evaluated: int = 0
    group_sequences: int = 0
    group_seq_len: int = 0


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """One rank's device memory, in bytes.

    Attributes:
        micro_batch: Sequences per forward call.
        hidden_on_host: Whether the hidden states stay in pinned host memory.
        slots: Weights of one layer of each type.
        hidden: Hidden states on the device: all of them, or two micro-batches.
        activations: What the widest layer holds while it computes.
        packing: Packed tensors on their way to the host.
        staging: Pinned host memory that packed tensors pass through: one layer's, and some more.
        host: Pinned host memory: hidden states, staging, and what is read ahead.
        evaluation: The evaluation's hidden states, and which blocks Hopper flushes.
        evaluated_at_a_time: Its sequences per forward call.
    """

    micro_batch: int
    hidden_on_host: bool
    slots: int
    hidden: int
    activations: int
    packing: int
    staging: int
    host: int
    evaluation: int = 0
    evaluated_at_a_time: int = 1

    @property
    def peak(self) -> int:
        """Most bytes allocated on the device at any time."""
        return self.slots + self.hidden + self.activations + self.packing + self.evaluation


def plan_memory(
    job: Job,
    *,
    tokens: tuple[int, int],
    compute_bytes: int,
    slots: int,
    read_ahead: int,
    wish: MemoryWish,
) -> MemoryPlan:
    """The largest micro-batch that fits, with hidden states on the device where they do.

    Args:
        job: A job whose layout fits.
        tokens: Calibration sequences and their length; (0, 0) without a forward pass.
        compute_bytes: Bytes per element of the compute dtype.
        slots: Bytes of all slots.
        read_ahead: Bytes of the read-ahead's host buffer.
        wish: What the user fixed, and the device.

    Raises:
        ConfigError: Not even one sequence at a time fits.
    """
    largest, widest = packed_sizes(job)
    staging = widest + 2 * largest
    sequences = math.ceil(tokens[0] / job.dims.dp)
    per_sequence = tokens[1] // job.dims.tp * job.architecture.hidden_size * compute_bytes

    def plan(micro_batch: int, on_host: bool) -> MemoryPlan:
        hidden = (2 * micro_batch if on_host else sequences) * per_sequence
        activations = 0
        if tokens[0]:
            activations = max(
                activation_bytes(
                    job.architecture, job.dims, kind, micro_batch * tokens[1], tokens[1]
                )
                for kind in dict.fromkeys(job.architecture.layers)
            )
        evaluation = 0
        if wish.evaluated and tokens[0]:
            streams = (2 + len(ServingMode)) * math.ceil(wish.evaluated / job.dims.dp)
            evaluation = streams * per_sequence + slots // (BLOCK_SIZE * compute_bytes)
            if wish.group_sequences:
                found = sum(len(groups_of(s, job.architecture)) for s in job.schedules)
                length = min(wish.group_seq_len, tokens[1])
                share = math.ceil(wish.group_sequences / job.dims.dp)
                evaluation += (found + 2) * share * per_sequence * length // tokens[1]
            if micro_batch == 1:  # quantized inputs beside the others; else half a micro-batch is
                evaluation += activations * compute_bytes // 4
        host = staging + read_ahead + (sequences * per_sequence if on_host else 0)
        return MemoryPlan(
            micro_batch,
            on_host,
            slots,
            hidden,
            activations * compute_bytes // 2,
            2 * largest,
            staging,
            host,
            evaluation,
            max(1, micro_batch // 2),
        )

    if wish.device_bytes is None or not tokens[0]:
        return plan(wish.micro_batch or 1, False)
    fixed = wish.micro_batch and min(wish.micro_batch, sequences)
    sizes = [fixed] if fixed else _sizes(sequences, tokens[1])
    return _largest_fitting(plan, sizes, tokens[1], wish)


def _largest_fitting(
    plan: Callable[[int, bool], MemoryPlan], sizes: list[int], seq_len: int, wish: MemoryWish
) -> MemoryPlan:
    """The first plan that fits: the largest micro-batch, and the device before the host."""
    assert wish.device_bytes is not None
    room = wish.device_bytes * (1 - FRAGMENTATION) - RESERVED_BYTES
    places = {"device": [False], "host": [True]}.get(wish.hidden_store, [False, True])
    for on_host in places:
        for size in sizes:
            is_small = size * seq_len < FEWEST_TOKENS_ON_DEVICE and size < sizes[0]
            if is_small and not on_host and len(places) > 1:
                break
            if plan(size, on_host).peak <= room:
                return plan(size, on_host)
    least = plan(sizes[-1], places[-1])
    parts = {
        "slots": least.slots,
        "hidden states": least.hidden,
        "activations": least.activations,
        "packing": least.packing,
        "evaluation": least.evaluation,
        "CUDA's own": RESERVED_BYTES,
    }
    raise ConfigError(
        "GPU memory",
        value=f"{wish.device_bytes / 2**30:.1f} GiB",
        rule="must hold "
        + " + ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        + " GiB",
        remedy="use more ranks (parallel.ep, parallel.tp), a shorter calibration.seq_len, "
        "or leave calibration.micro_batch and hidden_store to the plan",
    )


def smallest_plan(plans: Iterable[MemoryPlan | None]) -> MemoryPlan | None:
    """Of several ranks' plans, that of the rank with the least memory, which all must follow."""
    found = [plan for plan in plans if plan is not None]
    return min(found, key=lambda plan: (not plan.hidden_on_host, plan.micro_batch), default=None)


def activation_bytes(
    a: Architecture, dims: ParallelDims, kind: LayerType, micro_batch_tokens: int, seq_len: int
) -> int:
    """What one layer holds at its widest point, in a 16-bit compute dtype, its input not counted.

    Args:
        a: The model.
        dims: The rank grid.
        kind: Type of layer.
        micro_batch_tokens: Tokens of one micro-batch over all ranks of the TP group.
        seq_len: Tokens of a sequence.
    """
    local, tp = micro_batch_tokens // dims.tp, dims.tp
    held = 2 * local * a.hidden_size  # the norm's output
    if kind is LayerType.moe:
        return held + _moe_bytes(a, dims, local)
    if tp > 1:
        held += 2 * micro_batch_tokens * a.hidden_size  # gathered from the TP group
    if kind is LayerType.mamba:
        return held + _mamba_bytes(a, dims, micro_batch_tokens, seq_len)
    if kind is LayerType.attention:
        queries = a.num_attention_heads * a.head_dim // tp
        keys = max(a.num_key_value_heads // tp, 1) * a.head_dim
        # q, k and v and the mixed heads; then the mixed heads and o_proj's output
        widest = max(2 * queries + 2 * keys, queries + a.hidden_size)
        return held + 2 * micro_batch_tokens * widest
    return held + 2 * micro_batch_tokens * (a.intermediate_size // tp + a.hidden_size)


def packed_sizes(job: Job) -> tuple[int, int]:
    """Bytes of the largest block of packed tensors, and of all that a rank writes of one layer."""
    largest, widest = 0, 0
    for schedule in _one_of_each_type(job):
        for item in schedule.dense:
            largest = max(largest, _code_bytes(item.spec, item.module_format))
        for projection, module_format in schedule.experts.items():
            spec = expert_spec(job.architecture, schedule.layer, projection)
            held = job.architecture.n_routed_experts // (job.dims.ep * job.dims.edp) + 1
            count = min(held, experts_per_chunk(spec))
            largest = max(largest, count * _code_bytes(spec, module_format))
        widest = max(widest, *layer_written_bytes(job, schedule))
    return largest, widest


def _code_bytes(spec: TensorSpec, module_format: ModuleFormat) -> int:
    return spec.parameters // (1 if module_format.weight_format is Format.fp8 else 2)


def _mamba_bytes(a: Architecture, dims: ParallelDims, tokens: int, seq_len: int) -> int:
    """The projection and the scan's output of all tokens, and what one part of the scan holds."""
    heads, groups = a.mamba_num_heads // dims.tp, max(a.n_groups // dims.tp, 1)
    inner = heads * a.mamba_head_dim
    convolved = inner + 2 * groups * a.ssm_state_size
    at_a_time = max(1, SCAN_ELEMENTS // (seq_len * inner)) * seq_len
    part = min(tokens, at_a_time)
    state = inner * a.ssm_state_size // 128
    of_all = 2 * tokens * (sum(a.mamba_in_parts) // dims.tp + inner)
    return of_all + part * (2 * (convolved + state + inner + heads) + 8 * heads)


def _moe_bytes(a: Architecture, dims: ParallelDims, local: int) -> int:
    """The rows of this rank's experts at down_proj or when they are combined; routing, latents."""
    latent, group, top_k = a.expert_input_size, dims.ep * dims.etp, a.num_experts_per_tok
    gathered = local * group
    rows = gathered * top_k // dims.ep
    if dims.ep > 1:
        rows = round(rows * (1 + IMBALANCE / math.sqrt(a.n_routed_experts // dims.ep)))
    at_down_proj = rows * 2 * (latent + a.moe_intermediate_size // dims.etp)
    sums = gathered * latent * (4 if group > 1 else 2)  # fp32 where ranks add up their parts
    held = max(at_down_proj, rows * 2 * latent + sums)
    held += gathered * (2 * latent + 12 * top_k) + 20 * (rows // 128 + a.n_routed_experts)
    if group > 1:
        held += local * (2 * latent + 8 * top_k)
    return held


def _sizes(sequences: int, seq_len: int) -> list[int]:
    """Micro-batches worth trying, the largest first."""
    size, sizes = 1, [1]
    while size * 2 <= sequences and size * 2 * seq_len <= LARGEST_MICRO_BATCH_TOKENS:
        size *= 2
        sizes.append(size)
    return sizes[::-1]


def _one_of_each_type(job: Job) -> list[LayerSchedule]:
    """The schedules that differ in what they pack; layers of one type and format are alike."""
    found: dict[object, LayerSchedule] = {}
    for schedule in job.schedules:
        dense = tuple(item.module_format for item in schedule.dense)
        key = (schedule.layer_type, dense, tuple(schedule.experts.items()))
        found.setdefault(key, schedule)
    return list(found.values())
