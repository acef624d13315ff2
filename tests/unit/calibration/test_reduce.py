"""Statistics over real ranks: MAX and SUM, NaN kept, the rank at fault named."""

import pytest
import torch
import torch.distributed as dist

from pipeline.calibration.observers import AmaxObserver, Statistic, TokenCountObserver
from pipeline.calibration.reduce import reduce_statistics, refuse_nonfinite
from pipeline.errors import NumericsError
from pipeline.runtime.collectives import Ranks
from tests.distributed.helpers import run_ranks

CPU = torch.device("cpu")
ONE = Ranks(None, None, None, CPU)


def observed(name: str, *values: float) -> Statistic:
    observer = AmaxObserver(name, CPU)
    observer.observe(torch.tensor(values))
    return observer.statistic


def counted(*tokens: float) -> Statistic:
    observer = TokenCountObserver(len(tokens), CPU)
    observer.statistic.values += torch.tensor(tokens, dtype=torch.float64)
    return observer.statistic


def test_one_rank_needs_no_group() -> None:
    statistics = [observed("a", -2.0), counted(3, 0), observed("b")]
    reduced = reduce_statistics(statistics, None)
    assert {name: values.tolist() for name, values in reduced.items()} == {
        "a": [2.0],
        "b": [0.0],
        "tokens_per_expert": [3.0, 0.0],
    }
    refuse_nonfinite(statistics, reduced, 0, ONE)
    assert reduce_statistics([], None) == {}


def on_two_ranks(rank: int) -> tuple[dict[str, list[float]], str]:
    ranks = Ranks(dist.group.WORLD, None, None, CPU)
    first = [observed("a", 1.0 + rank), observed("b", 5.0 - rank), counted(rank, 2**40 * rank + 1)]
    reduced = reduce_statistics(first, ranks.world)
    refuse_nonfinite(first, reduced, 3, ranks)
    found = {name: values.tolist() for name, values in reduced.items()}
    second = [observed("a", 1.0), observed("b", float("nan") if rank else 7.0)]
    try:
        refuse_nonfinite(second, reduce_statistics(second, ranks.world), 3, ranks)
    except NumericsError as error:
        return found, str(error)
    return found, "not refused"


def test_two_ranks_reduce_and_refuse_together() -> None:
    (found, message), (found_1, message_1) = run_ranks(on_two_ranks, 2)
    assert found == found_1
    assert found == {"a": [2.0], "b": [5.0], "tokens_per_expert": [1.0, 2.0**40 + 2]}
    assert message.startswith(
        "layer 3: input activations of b: found NaN or Inf (rank 1); calibration needs finite"
    )
    assert "with compute_dtype=bfloat16 try float32" in message
    assert message_1.startswith("layer 3: input activations of b: found NaN or Inf; ")


def test_one_rank_refuses_inf() -> None:
    statistics = [observed("in_proj", float("inf")), observed("out_proj", 1.0)]
    with pytest.raises(NumericsError, match=r"layer 7: input activations of in_proj: .*\(rank 0\)"):
        refuse_nonfinite(statistics, reduce_statistics(statistics, None), 7, ONE)
