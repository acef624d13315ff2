"""Starting and stopping torch.distributed and megatron-core's process groups.

In: the degrees of parallelism, this process's rank and device. Out: `Groups`, the process groups
that the rest of the program uses. One code path for one rank and for many: a single rank has a
process group of its own. `start` may be called again with other degrees.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipeline.mcore import cpu
from pipeline.sharding import Coordinates, ParallelDims


@dataclasses.dataclass(frozen=True)
class Groups:
    """This rank's process groups.

    Attributes:
        dims: The degrees.
        rank: Rank in the world.
        at: Place of the rank on both grids.
        world: All ranks.
        tp: Ranks that cut the same dense tensors.
        dp: Ranks that hold the same dense shards and other sequences.
        ep: Ranks that hold other routed experts.
        etp: Ranks that cut the same routed experts.
        edp: Ranks that hold the same shards of routed experts.
        experts: Ranks that together hold all routed experts.
    """

    dims: ParallelDims
    rank: int
    at: Coordinates
    world: dist.ProcessGroup
    tp: dist.ProcessGroup
    dp: dist.ProcessGroup
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    edp: dist.ProcessGroup
    experts: dist.ProcessGroup


def start(
    dims: ParallelDims,
    rank: int,
    device: torch.device,
    *,
    timeout_s: float = 1800.0,
    init_method: str | None = None,
) -> Groups:
    """Initialises torch.distributed (where it is not yet) and megatron's process groups.

    Args:
        dims: The degrees; `dims.world` processes must call this.
        rank: This process's rank in the world.
        device: A CPU device means gloo and the CPU stand-in, a CUDA device NCCL and exact fp32 (a
            setting of torch that stays).
        timeout_s: Seconds after which a collective fails.
        init_method: How the processes find each other; None means "env://" (as torchrun sets it),
            or, for a world of one, nothing at all.
    """
    if device.type == "cpu":
        cpu.install()
    else:
        cpu.remove()
        torch.cuda.set_device(device)
        # torch lets cuDNN and, where asked, cuBLAS round fp32 to the 10 bits of TF32.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    if not dist.is_initialized():
        _init_world(dims.world, rank, device, timeout_s, init_method)
    assert (dist.get_world_size(), dist.get_rank()) == (dims.world, rank)
    _drop_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tp,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.etp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        create_gloo_process_groups=False,
    )
    groups = _collect_groups(dims, rank)
    _connect(groups, device)
    return groups


def stop() -> None:
    """Ends all process groups and puts back what `start` replaced in third-party modules."""
    _drop_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
    cpu.remove()


def _connect(groups: Groups, device: torch.device) -> None:
    """The sweep's collectives once in the groups it uses: NCCL connects at the first of a kind."""
    for group in dict.fromkeys((groups.world, groups.tp, groups.etp, groups.experts)):
        size = group.size()
        if size == 1:
            continue
        whole, part = torch.zeros(size, device=device), torch.zeros(1, device=device)
        dist.all_reduce(whole, group=group)
        dist.all_gather_into_tensor(whole, part, group=group)
        dist.reduce_scatter_tensor(part, whole, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _drop_groups() -> None:
    """Lets go of megatron's groups, those that `destroy_model_parallel` forgets included.

    A gloo group that outlives this call would be destroyed later, perhaps in a forked child, where
    its threads do not exist: the child hangs or crashes.
    """
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


def _init_world(
    world: int, rank: int, device: torch.device, timeout_s: float, init_method: str | None
) -> None:
    timeout = timedelta(seconds=timeout_s)
    on_cuda = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    bound = device if on_cuda else None
    if world == 1 and init_method is None:
        dist.init_process_group(
            backend,
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=timeout,
            device_id=bound,
        )
        return
    dist.init_process_group(
        backend,
        init_method=init_method or "env://",
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=bound,
    )


def _collect_groups(dims: ParallelDims, rank: int) -> Groups:
    """Megatron's groups; asserts that its rank order is the one our shard rules are written for."""
    state = parallel_state
    at = Coordinates(
        tp_rank=state.get_tensor_model_parallel_rank(),
        dp_rank=state.get_data_parallel_rank(),
        etp_rank=state.get_expert_tensor_parallel_rank(),
        ep_rank=state.get_expert_model_parallel_rank(),
        edp_rank=state.get_expert_data_parallel_rank(),
    )
    assert at == dims.coordinates(rank), f"megatron orders its ranks otherwise: rank {rank} is {at}"
    world = dist.group.WORLD
    assert world is not None
    return Groups(
        dims=dims,
        rank=rank,
        at=at,
        world=world,
        tp=state.get_tensor_model_parallel_group(),
        dp=state.get_data_parallel_group(),
        ep=state.get_expert_model_parallel_group(),
        etp=state.get_expert_tensor_parallel_group(),
        edp=state.get_expert_data_parallel_group(),
        experts=state.get_expert_tensor_and_model_parallel_group(),
    )
