"""What the streams say at the end, against all logits at once."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.evaluation import fidelity
from pipeline.evaluation.fidelity import Divergence, Head, Measured, compare, measure
from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.streams import Streams
from pipeline.runtime.collectives import Ranks
from pipeline.sharding import ParallelDims
from tests.distributed.helpers import run_ranks

CPU = torch.device("cpu")
VOCAB, HIDDEN, EPSILON = 37, 8, 1e-5
SEQUENCES, SEQ_LEN = 3, 24
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(VOCAB, (SEQUENCES, SEQ_LEN), generator=GENERATOR)
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=GENERATOR)
HEAD = Head(
    torch.rand(HIDDEN, generator=GENERATOR).bfloat16(),
    torch.randn(VOCAB, HIDDEN, generator=GENERATOR).bfloat16(),
    EPSILON,
)
REFERENCE = torch.randn(SEQUENCES, SEQ_LEN, HIDDEN, generator=GENERATOR)
SERVED = {
    mode: REFERENCE + noise * torch.randn(REFERENCE.shape, generator=GENERATOR)
    for mode, noise in ((ServingMode.w4a4, 0.5), (ServingMode.w4a16, 0.1))
}
SIZES = [(512, 16384), (5, 7), (8, 37), (1, 1)]


def dense(hidden: torch.Tensor) -> torch.Tensor:
    """fp64 log probabilities of everything at once."""
    weight, x = HEAD.norm_weight.double(), hidden.double()
    x = F.rms_norm(x, (HIDDEN,), weight, EPSILON)
    return (x @ HEAD.weight.double().T).log_softmax(-1)


def expected() -> tuple[float, dict[ServingMode, dict[str, float]]]:
    """Perplexity of the reference, and each mode's figures; the last position predicts nothing."""
    targets = IDS[:, 1:, None]
    p = dense(REFERENCE)[:, :-1]
    found = {}
    for mode, hidden in SERVED.items():
        q = dense(hidden)[:, :-1]
        kl = (p.exp() * (p - q)).sum(-1).flatten()
        found[mode] = {
            "perplexity": math.exp(-q.gather(-1, targets).mean().item()),
            "kl_mean": kl.mean().item(),
            "kl_p99": sorted(kl.tolist())[math.ceil(0.99 * len(kl)) - 1],
            "top1": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
            "clipped": 0.0,
        }
    return math.exp(-p.gather(-1, targets).mean().item()), found


def filled(dims: ParallelDims, rank: int, micro_batch: int = 2) -> Streams:
    """Streams after a last layer that left `REFERENCE` and `SERVED`; padding is NaN."""
    streams = Streams(
        IDS,
        EMBEDDING,
        dims,
        rank,
        layers=1,
        micro_batch=micro_batch,
        dtype=torch.float32,
        device=CPU,
        modes=tuple(ServingMode),
        backend="reference",
    )
    for number, batch in enumerate(streams.batches):
        is_padding = batch.weights == 0
        here = streams.store.positions
        states = {mode: values[batch.sequences, here] for mode, values in SERVED.items()}
        hidden = REFERENCE[batch.sequences, here].transpose(0, 1).contiguous()
        batch.hidden = hidden.masked_fill(is_padding[:, None], math.nan)
        for mode, values in states.items():
            moved = values.transpose(0, 1).contiguous()
            streams.served[mode][number] = moved.masked_fill(is_padding[:, None], math.nan)
    return streams


def measured(rank: int, world: int, tp: int) -> Measured:
    group = dist.group.WORLD if world > 1 else None
    streams = filled(ParallelDims(world=world, tp=tp), rank)
    return measure(streams, HEAD, Ranks(group, None, None, CPU))


def check(found: Measured) -> None:
    perplexity, modes = expected()
    assert found.perplexity == pytest.approx(perplexity, rel=1e-6)
    assert [item.mode for item in found.modes] == ["w4a4", "w4a16"]
    for item in found.modes:
        wanted: Any = modes[ServingMode(item.mode)]
        assert wanted["kl_p99"] > 2 * wanted["kl_mean"]
        assert 0.2 < wanted["top1"] < 1
        for name, value in wanted.items():
            assert getattr(item, name) == pytest.approx(value, rel=1e-5), (item.mode, name)


@pytest.mark.parametrize("rows", [16384, 37, 7, 1])
def test_log_probabilities_are_those_of_all_logits(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "_VOCAB_ROWS", rows)
    found = HEAD.log_probabilities(REFERENCE[0].bfloat16())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), dense(REFERENCE[0].bfloat16()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("positions", "rows"), SIZES)
def test_figures_are_those_of_all_logits(
    positions: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 positions and 37 tokens are no multiple of the sizes."""
    monkeypatch.setattr(fidelity, "_POSITIONS", positions)
    monkeypatch.setattr(fidelity, "_VOCAB_ROWS", rows)
    check(measured(0, 1, 1))


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_measure_the_same(world: int, tp: int) -> None:
    """Three sequences on two replicas: padding does not count, or all would be NaN."""
    everyone = run_ranks(measured, world, world, tp)
    assert all(found == everyone[0] for found in everyone)
    check(everyone[0])


def test_a_rank_without_a_sequence_of_its_own_adds_nothing() -> None:
    check(run_ranks(measured, 4, 4, 1)[3])


def test_equal_streams_diverge_nowhere() -> None:
    streams = filled(ParallelDims(), 0)
    for values in streams.served.values():
        values[:] = [batch.hidden.clone() for batch in streams.batches]
    found = measure(streams, HEAD, Ranks(None, None, None, CPU))
    for item in found.modes:
        assert (item.kl_mean, item.kl_p99, item.top1) == (0.0, 0.0, 1.0)
        assert item.perplexity == found.perplexity


def test_two_sets_of_probabilities_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    served = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    found = Divergence()
    compare(reference, served, torch.tensor([0, 2]), found)
    assert found.kl[0].tolist() == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-7)
    assert found.losses[0].tolist() == pytest.approx([math.log(4), math.log(10)])
    assert found.agrees[0].tolist() == [0.0, 1.0]


def test_a_model_that_broke_is_said_to_be_infinitely_perplexed() -> None:
    streams = filled(ParallelDims(), 0)
    norm = HEAD.norm_weight.float() * 1e6
    found = measure(streams, Head(norm, HEAD.weight, EPSILON), Ranks(None, None, None, CPU))
    assert found.modes[0].perplexity == math.inf
    streams.served[ServingMode.w4a4][0].fill_(math.nan)
    broken, sound = measure(streams, HEAD, Ranks(None, None, None, CPU)).modes
    assert not broken.perplexity < math.inf
    assert math.isnan(broken.kl_mean)
    assert math.isfinite(sound.kl_mean)
