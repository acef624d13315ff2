"""Reduce first, choose after: statistics of whole logical tensors from those of shards.

In: statistics of this rank. Out: the same for all ranks that hold parts: MAX in fp32, SUM in fp64,
one collective per operation and group, however many tensors a layer has.
"""

from __future__ import annotations

import torch

from pipeline.calibration.observers import Reduction, Statistic
from pipeline.errors import NumericsError
from pipeline.runtime.collectives import Group, Ranks, gather_objects, reduce_max, reduce_sum


def reduce_statistics(statistics: list[Statistic], group: Group | None) -> dict[str, torch.Tensor]:
    """Reduces a layer's activation statistics; returns CPU tensors by name."""
    reduced: dict[str, torch.Tensor] = {}
    for reduction, collective in ((Reduction.max, reduce_max), (Reduction.sum, reduce_sum)):
        chosen = [item for item in statistics if item.reduction is reduction]
        if not chosen:
            continue
        values = collective(torch.cat([item.values for item in chosen]), group).cpu()
        parts = values.split([item.values.numel() for item in chosen])
        reduced.update({item.name: part for item, part in zip(chosen, parts, strict=True)})
    return reduced


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
