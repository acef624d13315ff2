"""The loss is torch's cross entropy, whatever the layout; a bad model is refused in words."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.calibration import loss as loss_module
from pipeline.calibration.hidden import HiddenStore
from pipeline.calibration.loss import check_loss, next_token_loss, unigram_loss
from pipeline.errors import NumericsError
from pipeline.runtime.collectives import Ranks
from pipeline.sharding import ParallelDims
from tests.distributed.helpers import run_ranks

CPU = torch.device("cpu")
VOCAB, HIDDEN, EPSILON = 37, 8, 1e-5
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(VOCAB, (7, 12), generator=GENERATOR)
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=GENERATOR)
HEAD = torch.randn(VOCAB, HIDDEN, generator=GENERATOR).bfloat16()
NORM = torch.rand(HIDDEN, generator=GENERATOR).bfloat16()


def expected(sequences: int) -> float:
    hidden = F.rms_norm(EMBEDDING[IDS[:sequences]], (HIDDEN,), NORM.float(), EPSILON)
    logits = hidden @ HEAD.float().T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:sequences, 1:].flatten()).item()


def measured(rank: int, tp: int, world: int, sequences: int) -> float:
    dims = ParallelDims(world=world, tp=tp)
    group = dist.group.WORLD if world > 1 else None
    store = HiddenStore(IDS, EMBEDDING, dims, rank, micro_batch=3, dtype=torch.float32, device=CPU)
    ranks = Ranks(group, None, None, CPU)
    return next_token_loss(store, NORM, HEAD, EPSILON, sequences=sequences, ranks=ranks)


@pytest.mark.parametrize("sequences", [1, 5, 7, 100])
@pytest.mark.parametrize("rows", [5, 16, 16384])
def test_the_loss_is_cross_entropy(
    sequences: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "VOCAB_ROWS", rows)
    assert measured(0, 1, 1, sequences) == pytest.approx(expected(sequences), rel=1e-6)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_four_ranks_measure_the_same(tp: int) -> None:
    """Seven sequences: padding must not count; targets cross the cut between positions."""
    found = run_ranks(measured, 4, tp, 4, 7)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(expected(7), rel=1e-6)


def test_loss_of_token_frequencies() -> None:
    ids = torch.tensor([[0, 0, 0, 1], [2, 2, 1, 0]])
    # Counts 4, 2, 2, 0, each plus one: 5, 3, 3, 1 of 12.
    first = -(2 * math.log(5 / 12) + math.log(3 / 12)) / 3
    both = (3 * first - (2 * math.log(3 / 12) + math.log(5 / 12))) / 6
    assert unigram_loss(ids, 4, 1) == pytest.approx(first, rel=1e-12)
    assert unigram_loss(ids, 4, 2) == pytest.approx(both, rel=1e-12)
    assert unigram_loss(ids, 4, 99) == pytest.approx(both, rel=1e-12)


def test_a_model_that_beats_frequencies_passes() -> None:
    check_loss(2.0, 5.0, allow_bad_loss=False)
    check_loss(5.0, 5.0, allow_bad_loss=False)


def test_a_model_worse_than_frequencies_is_refused_unless_allowed() -> None:
    with pytest.raises(NumericsError) as caught:
        check_loss(6.5, 5.25, allow_bad_loss=False)
    message = str(caught.value)
    assert message.startswith(
        "BF16 next-token loss on the calibration text: found 6.500 nats per token; "
        "must not be worse than that of token frequencies alone (5.250)"
    )
    assert "allow_bad_loss=true publishes all the same" in message
    check_loss(6.5, 5.25, allow_bad_loss=True)


@pytest.mark.parametrize("allowed", [True, False])
def test_nan_is_never_allowed(allowed: bool) -> None:
    with pytest.raises(NumericsError, match="found nan nats per token"):
        check_loss(float("nan"), 5.0, allow_bad_loss=allowed)
