"""The few collectives of the sweep.

In: tensors and the process group that holds parts of them. Out: reduced tensors, or packed shards
on their owner. A group of one rank makes every call a no-op here, so callers never ask. MAX runs in
fp32 and SUM in fp64; float8 never enters a collective (gloo refuses it), its bytes do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The groups that the sweep reduces over.

    Attributes:
        world: All ranks.
        tp: Ranks that hold the parts of one dense tensor.
        etp: Ranks that hold the parts of one expert.
        device: Where tensors must lie to enter a collective.
    """

    world: Group | None
    tp: Group | None
    etp: Group | None
    device: torch.device

    @property
    def rank(self) -> int:
        """Index of this rank among all."""
        return 0 if self.world is None else dist.get_rank(self.world)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return size(self.world)


def size(group: Group | None) -> int:
    """Number of ranks of a group (1 without one)."""
    return 1 if group is None else dist.get_world_size(group)


def reduce_max(values: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Element-wise MAX over `group`, fp32. NaN becomes inf first: MAX would drop it silently."""
    values = torch.nan_to_num(values.float(), nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    if size(group) > 1 and values.numel():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def reduce_sum(values: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Element-wise SUM over `group`, fp64."""
    values = values.double().clone()
    if size(group) > 1 and values.numel():
        dist.all_reduce(values, dist.ReduceOp.SUM, group=group)
    return values


def reduce_bucket(maxima: torch.Tensor, sums: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Element-wise MAX of some values and SUM of others over `group`, in one collective.

    Args:
        maxima: fp32 [m]; NaN becomes inf first, as in `reduce_max`.
        sums: fp64 [s], added in the order of the ranks.
        group: Ranks that hold parts.

    Returns:
        fp64 [m + s]: the maxima, then the sums.
    """
    maxima = torch.nan_to_num(maxima.float(), nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    bucket = torch.cat([maxima.double(), sums.double()])
    if size(group) == 1 or not bucket.numel():
        return bucket
    everyone = bucket.new_empty(size(group) * bucket.numel())
    dist.all_gather_into_tensor(everyone, bucket, group=group)
    everyone = everyone.view(size(group), -1)
    count = maxima.numel()
    return torch.cat([everyone[:, :count].amax(0), everyone[:, count:].sum(0)])


def gather_bytes(part: torch.Tensor, owner: int, group: Group | None) -> list[torch.Tensor] | None:
    """Every rank's `part` (same shape and dtype), in group order, on group rank `owner` only."""
    if size(group) == 1:
        return [part]
    data = part.contiguous().view(torch.uint8)
    mine = dist.get_rank(group) == owner
    parts = [torch.empty_like(data) for _ in range(size(group))] if mine else None
    dist.gather(data, parts, group=group, group_dst=owner)
    return None if parts is None else [piece.view(part.dtype) for piece in parts]


def gather_objects(value: Any, group: Group | None) -> list[Any]:
    """Every rank's small picklable `value`, in rank order, on rank 0 (empty list elsewhere)."""
    if size(group) == 1:
        return [value]
    mine = dist.get_rank(group) == 0
    values: list[Any] | None = [None] * size(group) if mine else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values or []


def broadcast_object(value: Any, group: Group | None) -> Any:
    """Rank 0's small picklable `value`, on every rank."""
    if size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def barrier(group: Group | None) -> None:
    """Waits until every rank of `group` is here; the devices go on meanwhile.

    A reduction of a CPU tensor, because NCCL's own barrier would wait for the device's queue.
    """
    if size(group) > 1:
        dist.all_reduce(torch.zeros(1), group=group)


def disconnect() -> None:
    """Ends the process groups, where there are any; nothing may be sent afterwards."""
    if dist.is_initialized():
        dist.destroy_process_group()
