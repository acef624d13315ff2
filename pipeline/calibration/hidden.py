"""The hidden store: the hidden states of this rank's calibration tokens, between layers.

In: token ids, the same on every rank. Out: micro-batches [seq/tp, batch, hidden], updated in
place layer by layer. The data-parallel ranks take turns at the sequences and all run the same
number of them: what is missing at the end repeats a real sequence with weight 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pipeline.sharding import ParallelDims


@dataclasses.dataclass
class MicroBatch:
    """Some sequences on their way through the layers.

    Attributes:
        sequences: Index of each in the calibration set, [batch].
        weights: 1 for a sequence of its own, 0 for padding, fp32 [batch].
        hidden: Hidden states of this rank's positions, [seq/tp, batch, hidden].
    """

    sequences: list[int]
    weights: torch.Tensor
    hidden: torch.Tensor


def share_sequences(count: int, dims: ParallelDims, dp_rank: int) -> list[tuple[int, float]]:
    """Sequences of one data-parallel rank, with weights; as many on every rank."""
    mine = []
    for turn in range(math.ceil(count / dims.dp)):
        index = turn * dims.dp + dp_rank
        mine.append((index, 1.0) if index < count else (index % count, 0.0))
    return mine


def local_positions(seq_len: int, dims: ParallelDims, tp_rank: int) -> slice:
    """Positions of a sequence that this rank holds (sequence parallelism)."""
    local = seq_len // dims.tp
    return slice(tp_rank * local, (tp_rank + 1) * local)


class HiddenStore:
    """All micro-batches of this rank.

    Args:
        token_ids: int64 [sequences, seq_len], the whole calibration set.
        embedding: [vocab, hidden], in the source's dtype; not kept.
        dims: The rank grid.
        rank: This rank.
        micro_batch: Sequences per forward call.
        dtype: Compute dtype.
        device: Where the hidden states stay.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        embedding: torch.Tensor,
        dims: ParallelDims,
        rank: int,
        *,
        micro_batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.token_ids = token_ids
        at = dims.coordinates(rank)
        self.positions = local_positions(token_ids.shape[1], dims, at.tp_rank)
        mine = share_sequences(token_ids.shape[0], dims, at.dp_rank)
        self.batches: list[MicroBatch] = []
        for start in range(0, len(mine), micro_batch):
            chosen = mine[start : start + micro_batch]
            indices = [index for index, _ in chosen]
            ids = token_ids[indices][:, self.positions]
            hidden = F.embedding(ids, embedding).transpose(0, 1).to(device, dtype).contiguous()
            weights = torch.tensor([weight for _, weight in chosen], device=device)
            self.batches.append(MicroBatch(indices, weights, hidden))

    @property
    def tokens(self) -> int:
        """Distinct calibration tokens of all ranks."""
        return self.token_ids.numel()

    def update(self, layer: Callable[[MicroBatch], torch.Tensor]) -> None:
        """Replaces every micro-batch's hidden states by what `layer` makes of them."""
        for batch in self.batches:
            batch.hidden = layer(batch)
