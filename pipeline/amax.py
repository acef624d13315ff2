"""What weights are scaled by: the amax of whole logical tensors.

In: the shards that this rank holds. Out: one amax for each tensor, the same on all ranks that hold
parts of it: reduced over those ranks, shared by tensors that a server fuses, and for FP8 multiplied
by what its search finds best. All ranks of a group call these in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from pipeline.calibration.choose import choose_fp8_amax
from pipeline.nvfp4.backends import Backend
from pipeline.recipe import ModuleFormat
from pipeline.runtime.collectives import Group, reduce_max, reduce_sum
from pipeline.schedule import DenseItem, tap_of


def dense_amax(
    items: Sequence[DenseItem],
    local: Sequence[torch.Tensor],
    counted: Sequence[bool],
    backend: Backend,
    tp: Group | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Amax of dense tensors.

    Args:
        items: The tensors.
        local: This rank's shard [N, K] of each.
        counted: Whether this rank's shard counts in a sum over the ranks (one of several equal
            ones does).
        backend: What reads the weights.
        tp: Ranks that hold the parts.

    Returns:
        What this rank's shards have, and what the tensors are scaled by; fp32 [n] each.
    """
    seen = torch.stack([backend.tensor_amax(weight) for weight in local])
    amax = _share_in_fused_groups(items, reduce_max(seen, tp))
    for multipliers in dict.fromkeys(item.module_format.fp8_multipliers for item in items):
        if not multipliers:
            continue
        chosen = [i for i, x in enumerate(items) if x.module_format.fp8_multipliers == multipliers]
        errors = torch.stack(
            [
                backend.fp8_squared_errors(local[i], amax[i], multipliers) * float(counted[i])
                for i in chosen
            ]
        )
        errors = _sum_in_fused_groups([items[i] for i in chosen], reduce_sum(errors, tp))
        better = choose_fp8_amax(amax[chosen], errors, multipliers)
        amax = amax.index_copy(0, torch.tensor(chosen, device=amax.device), better)
    return seen, amax


def expert_amax(
    formats: Mapping[str, ModuleFormat],
    stacks: Mapping[str, torch.Tensor],
    backend: Backend,
    etp: Group | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Amax of routed experts.

    Args:
        formats: By projection.
        stacks: This rank's shards [E, N, K] by projection, in the same order.
        backend: What reads the weights.
        etp: Ranks that hold the parts of the same experts.

    Returns:
        What this rank's shards have, fp32 [projections, E]; and by projection what its experts are
        scaled by, fp32 [E].
    """
    seen = torch.stack([backend.tensor_amax(stack) for stack in stacks.values()])
    amax = dict(zip(stacks, reduce_max(seen, etp).unbind(0), strict=True))
    for name, stack in stacks.items():
        multipliers = formats[name].fp8_multipliers
        if multipliers:
            errors = backend.fp8_squared_errors(stack, amax[name], multipliers)
            amax[name] = choose_fp8_amax(amax[name], reduce_sum(errors, etp), multipliers)
    return seen, amax


def _fused_groups(items: Sequence[DenseItem]) -> Iterator[list[int]]:
    """Indices of the tensors that a server fuses: q, k and v read the same input."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(tap_of(item.spec.module), []).append(index)
    yield from (group for group in groups.values() if len(group) > 1)


def _share_in_fused_groups(items: Sequence[DenseItem], amax: torch.Tensor) -> torch.Tensor:
    """One amax per fused group, the largest; [n]."""
    amax = amax.clone()
    for group in _fused_groups(items):
        amax[group] = amax[group].max()
    return amax


def _sum_in_fused_groups(items: Sequence[DenseItem], errors: torch.Tensor) -> torch.Tensor:
    """One row of candidate errors per fused group, their sum; [n, T]."""
    errors = errors.clone()
    for group in _fused_groups(items):
        errors[group] = errors[group].sum(0)
    return errors
