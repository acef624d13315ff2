"""Observers: largest absolute values, NaN that cannot get lost, tokens counted once."""

import pytest
import torch

from pipeline.calibration.observers import (
    AmaxObserver,
    LayerObserver,
    Reduction,
    TokenCountObserver,
)

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax_is_the_largest_over_all_calls(dtype: torch.dtype) -> None:
    observer = AmaxObserver("x", CPU)
    assert observer.statistic.values.tolist() == [0.0]
    for values in ([[1.0, -3.0]], [[2.0, 0.5]], [[-0.0, 0.0]]):
        observer.observe(torch.tensor(values, dtype=dtype))
    observer.observe(torch.empty(0, 8, dtype=dtype))
    assert observer.statistic.values.tolist() == [3.0]
    assert observer.statistic.values.dtype is torch.float32
    assert observer.statistic.reduction is Reduction.max


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_not_finite_stays_seen(bad: float, at: int) -> None:
    observer = AmaxObserver("x", CPU)
    values = [1.0, 2.0, 3.0]
    values[at] = bad
    observer.observe(torch.tensor(values))
    observer.observe(torch.tensor([5.0]))
    assert observer.statistic.values.tolist() == [INF]


def test_tokens_of_padding_do_not_count() -> None:
    observer = TokenCountObserver(3, CPU)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32)
    observer.observe(chosen, torch.tensor([1.0, 0.0, 1.0]))
    observer.observe(chosen, torch.tensor([0.0, 1.0, 0.0]))
    assert observer.statistic.values.tolist() == [2.0, 2.0, 2.0]
    assert observer.statistic.values.dtype is torch.float64
    assert observer.statistic.reduction is Reduction.sum


def test_weights_follow_rows_of_position_times_batch_plus_sequence() -> None:
    """Three positions of a batch of two; the second sequence is padding."""
    observer = LayerObserver((), 6, CPU)
    observer.begin_batch(torch.tensor([1.0, 0.0]), 3)
    observer.routing(torch.arange(6).view(6, 1))
    (statistic,) = observer.statistics()
    assert statistic.values.tolist() == [1, 0, 1, 0, 1, 0]


def test_a_layer_observes_only_what_is_asked_and_in_that_order() -> None:
    observer = LayerObserver(("b", "a"), 2, CPU)
    observer.begin_batch(torch.ones(1), 1)
    observer.activation("a", torch.tensor([4.0]))
    observer.activation("c", torch.tensor([NAN]))
    observer.routing(torch.tensor([[0]]))
    found = {s.name: s.values.tolist() for s in observer.statistics()}
    assert found == {"b": [0.0], "a": [4.0], "tokens_per_expert": [1.0, 0.0]}
    assert list(found) == ["b", "a", "tokens_per_expert"]


def test_layers_without_experts_count_no_tokens() -> None:
    observer = LayerObserver((), 0, CPU)
    observer.routing(torch.tensor([[0, 1, 2, 3]]))
    assert observer.statistics() == []


def test_kernels_may_raise_what_is_observed() -> None:
    observer = LayerObserver(("a",), 0, CPU)
    amax = observer.amax_of("a")
    assert amax is not None
    assert observer.amax_of("b") is None
    amax.fill_(3.0)
    observer.activation("a", torch.tensor([-2.0]))
    (statistic,) = observer.statistics()
    assert statistic.values.tolist() == [3.0]
