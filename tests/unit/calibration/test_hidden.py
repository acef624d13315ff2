"""The hidden store: every sequence once with weight 1, as many calls on every rank."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from pipeline.calibration.hidden import HiddenStore, MicroBatch, local_positions, share_sequences
from pipeline.sharding import ParallelDims

EMBEDDING = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).bfloat16()


def store(ids: torch.Tensor, dims: ParallelDims, rank: int, micro_batch: int = 2) -> HiddenStore:
    return HiddenStore(
        ids,
        EMBEDDING,
        dims,
        rank,
        micro_batch=micro_batch,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def token_ids(sequences: int, seq_len: int) -> torch.Tensor:
    return torch.arange(sequences * seq_len).view(sequences, seq_len) % 11


def test_seven_sequences_on_four_ranks() -> None:
    dims = ParallelDims(world=4)
    assert [share_sequences(7, dims, rank) for rank in range(4)] == [
        [(0, 1.0), (4, 1.0)],
        [(1, 1.0), (5, 1.0)],
        [(2, 1.0), (6, 1.0)],
        [(3, 1.0), (0, 0.0)],
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("dp", [1, 2, 3, 4, 8])
def test_every_sequence_counts_once(count: int, dp: int) -> None:
    shares = [share_sequences(count, ParallelDims(world=dp), rank) for rank in range(dp)]
    weights: Counter[int] = Counter()
    for share in shares:
        for index, weight in share:
            weights[index] += int(weight)
    assert weights == dict.fromkeys(range(count), 1)
    assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 16])
def test_all_ranks_make_the_same_number_of_equal_calls(micro_batch: int) -> None:
    dims = ParallelDims(world=4, tp=2)
    stores = [store(token_ids(7, 8), dims, rank, micro_batch) for rank in range(4)]
    sizes = {tuple(len(batch.sequences) for batch in s.batches) for s in stores}
    assert len(sizes) == 1
    assert sum(next(iter(sizes))) == 4
    assert {s.tokens for s in stores} == {56}


def test_tensor_parallel_ranks_hold_positions_of_the_same_sequences() -> None:
    dims = ParallelDims(world=2, tp=2)
    ids = token_ids(3, 8)
    whole = F.embedding(ids, EMBEDDING).float()
    for rank in range(2):
        for batch in store(ids, dims, rank).batches:
            wanted = whole[batch.sequences, 4 * rank : 4 * rank + 4].transpose(0, 1)
            assert torch.equal(batch.hidden, wanted)
            assert batch.hidden.is_contiguous()
            assert batch.weights.tolist() == [1.0] * len(batch.sequences)
    assert local_positions(8, ParallelDims(world=4, tp=4), 3) == slice(6, 8)


def test_a_layer_updates_every_micro_batch() -> None:
    hidden = store(token_ids(3, 4), ParallelDims(), 0)
    before = [batch.hidden.clone() for batch in hidden.batches]
    seen = []

    def layer(batch: MicroBatch) -> torch.Tensor:
        seen.append(batch.sequences)
        return batch.hidden * 2

    hidden.update(layer)
    assert seen == [[0, 1], [2]]
    for old, batch in zip(before, hidden.batches, strict=True):
        assert torch.equal(batch.hidden, 2 * old)
