"""The hidden store: the hidden states of this rank's calibration tokens, between layers.

In: token ids, the same on every rank. Out: micro-batches [seq/tp, batch, hidden], updated in
place layer by layer. The data-parallel ranks take turns at the sequences and all run the same
number of them: what is missing at the end repeats a real sequence with weight 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from pipeline.runtime.lanes import Lane, Mark
from pipeline.runtime.pinned import host_memory
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
        embedding: [vocab, hidden], in the source's dtype, on any device; not kept.
        dims: The rank grid.
        rank: This rank.
        micro_batch: Sequences per forward call.
        dtype: Compute dtype.
        device: Where the layers run.
        on_host: Keep the hidden states in pinned host memory; two micro-batches at a time are on
            the device, one computing while the other one's copies run.
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
        on_host: bool = False,
    ) -> None:
        self.token_ids, self.device = token_ids, device
        self.on_host = on_host and device.type == "cuda"
        at = dims.coordinates(rank)
        self.positions = local_positions(token_ids.shape[1], dims, at.tp_rank)
        mine = share_sequences(token_ids.shape[0], dims, at.dp_rank)
        self.batches: list[MicroBatch] = []
        for start in range(0, len(mine), micro_batch):
            chosen = mine[start : start + micro_batch]
            indices = [index for index, _ in chosen]
            ids = token_ids[indices][:, self.positions].to(embedding.device)
            # [seq/tp, batch] first: the lookup then writes the layout that the layers want.
            hidden = F.embedding(ids.T.contiguous(), embedding).to(device, dtype)
            weights = torch.tensor([weight for _, weight in chosen], device=device)
            if self.on_host:
                hidden = _pin(hidden)
            self.batches.append(MicroBatch(indices, weights, hidden))
        self._staging = _Staging(self.batches, device) if self.on_host else None
        self._waits: list[Callable[[], object]] = []

    @property
    def tokens(self) -> int:
        """Distinct calibration tokens of all ranks."""
        return self.token_ids.numel()

    def update(
        self,
        layer: Callable[[MicroBatch], torch.Tensor],
        between: Callable[[int], None] = lambda index: None,
    ) -> None:
        """Replaces every micro-batch's hidden states by what `layer` makes of them.

        Args:
            layer: May overwrite the hidden states that it is given.
            between: Called after each micro-batch was enqueued, with its index.
        """
        for index, batch in enumerate(self.batches):
            if self._waits:
                self._waits[index]()
            if self._staging is None:
                batch.hidden = layer(batch)
            else:
                self._staging.run(index, layer)
            between(index)
        self._waits = []

    def state(self) -> dict[str, torch.Tensor]:
        """The hidden states where they lie, by index of the micro-batch; those on the host settled.

        The next update overwrites them: `keep_until` puts it off.
        """
        if self._staging is not None:
            self._staging.settle()
        return {f"{index:05d}": batch.hidden for index, batch in enumerate(self.batches)}

    def keep_until(self, waits: Sequence[Callable[[], object]]) -> None:
        """Before the next update overwrites a micro-batch, its own of these calls returns."""
        assert len(waits) == len(self.batches)
        self._waits = list(waits)

    @torch.inference_mode()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over the hidden states of `state()`, of a store of the same sequences."""
        assert len(state) == len(self.batches)
        for index, batch in enumerate(self.batches):
            batch.hidden.copy_(same_shape(state[f"{index:05d}"], batch.hidden))

    def on_device(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states of one micro-batch, on the device."""
        if self._staging is not None:
            self._staging.settle()
        return batch.hidden.to(self.device)


def same_shape(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values, which have the shape and dtype of `like`: `copy_` would stretch and convert."""
    assert values.shape == like.shape, (values.shape, like.shape)
    assert values.dtype == like.dtype
    return values


def _pin(hidden: torch.Tensor) -> torch.Tensor:
    """The same values in page-locked host memory."""
    memory = host_memory(hidden.nbytes, pinned=True)
    return memory.view(hidden.dtype).view(hidden.shape).copy_(hidden)


class _Staging:
    """Carries micro-batches from pinned memory to the device and back, on lanes of their own.

    Micro-batch i lies in buffer i % 2. A copy in waits until the copy out of the same buffer, and
    the last copy out of the same micro-batch, have ended.
    """

    def __init__(self, batches: list[MicroBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._up, self._down = Lane(device), Lane(device)
        largest = max(batch.hidden.numel() for batch in batches)
        dtype = batches[0].hidden.dtype
        self._buffers = [torch.empty(largest, dtype=dtype, device=device) for _ in range(2)]
        self._left: list[Mark | None] = [None for _ in batches]
        self._emptied = [Mark(device), Mark(device)]  # of what used their memory before
        self._arrived: dict[int, Mark] = {}

    def run(self, index: int, layer: Callable[[MicroBatch], torch.Tensor]) -> None:
        """One micro-batch through one layer; the next one is on its way meanwhile."""
        if index not in self._arrived:
            self._load(index)
        if index + 1 < len(self._batches):
            self._load(index + 1)
        self._arrived.pop(index).block_stream()
        staged = self._view(index)
        batch = self._batches[index]
        hidden = layer(dataclasses.replace(batch, hidden=staged))
        if hidden.data_ptr() != staged.data_ptr():
            staged.copy_(hidden)
        computed = Mark(self._device)
        with self._down.use():
            computed.block_stream()
            batch.hidden.copy_(staged, non_blocking=True)
            self._emptied[index % 2] = self._left[index] = Mark(self._device)

    def settle(self) -> None:
        """Waits until everything is back on the host."""
        for mark in self._left:
            if mark is not None:
                mark.synchronize()

    def _load(self, index: int) -> None:
        with self._up.use():
            self._emptied[index % 2].block_stream()
            if (left := self._left[index]) is not None:
                left.block_stream()
            self._view(index).copy_(self._batches[index].hidden, non_blocking=True)
            self._arrived[index] = Mark(self._device)

    def _view(self, index: int) -> torch.Tensor:
        shape = self._batches[index].hidden.shape
        return self._buffers[index % 2][: shape.numel()].view(shape)
