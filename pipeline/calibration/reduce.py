"""Reduce first, choose after: statistics of whole logical tensors from those of shards.

In: statistics of this rank. Out: the same for all ranks, by one collective, however many tensors a
layer has.
"""

from __future__ import annotations

import torch

from pipeline.calibration.observers import Reduction, Statistic
from pipeline.errors import NumericsError
from pipeline.runtime.collectives import Group, Ranks, gather_objects, reduce_bucket
from pipeline.runtime.lanes import HostCopy


class ReducedStatistics:
    """A layer's activation statistics over all ranks, on their way to the host.

    Making one is a collective (MAX and SUM in one bucket) and does not wait for the device.

    Args:
        statistics: Of this rank; the same ones in the same order on every rank.
        group: All ranks.
    """

    def __init__(self, statistics: list[Statistic], group: Group | None) -> None:
        by_operation = sorted(statistics, key=lambda item: item.reduction is Reduction.sum)
        self._sizes = {item.name: item.values.numel() for item in by_operation}
        self._copy: HostCopy | None = None
        if by_operation:
            parts = {
                reduction: [item.values for item in by_operation if item.reduction is reduction]
                for reduction in Reduction
            }
            device = by_operation[0].values.device
            maxima, sums = (
                torch.cat(parts[r]) if parts[r] else torch.empty(0, device=device)
                for r in (Reduction.max, Reduction.sum)
            )
            self._copy = HostCopy(reduce_bucket(maxima, sums, group))

    def values(self) -> dict[str, torch.Tensor]:
        """CPU tensors by name, fp64; waits for them."""
        if self._copy is None:
            return {}
        parts = self._copy.get().split(list(self._sizes.values()))
        return dict(zip(self._sizes, parts, strict=True))


def reduce_statistics(statistics: list[Statistic], group: Group | None) -> dict[str, torch.Tensor]:
    """Reduces a layer's activation statistics; returns CPU tensors by name."""
    return ReducedStatistics(statistics, group).values()


def refuse_nonfinite(
    statistics: list[Statistic], reduced: dict[str, torch.Tensor], layer: int, ranks: Ranks
) -> None:
    """Refuses NaN or Inf in activations, naming layer, projection and the ranks that saw it.

    All ranks come here with the same reduced values, so all take part in the extra collective.

    Raises:
        NumericsError: On every rank; only rank 0's names the ranks at fault.
    """
    bad = [name for name, values in reduced.items() if not values.isfinite().all()]
    if not bad:
        return
    seen = [s.name for s in statistics if s.name in bad and not s.values.isfinite().all()]
    everyone = gather_objects(seen, ranks.world)
    culprits = [rank for rank, names in enumerate(everyone) if names]
    raise NumericsError(
        f"layer {layer}: input activations of {', '.join(bad)}",
        value="NaN or Inf" + (f" (rank {', '.join(map(str, culprits))})" if culprits else ""),
        rule="calibration needs finite activations",
        remedy="check the source weights of this layer and of those before it; "
        "with compute_dtype=bfloat16 try float32",
    )
