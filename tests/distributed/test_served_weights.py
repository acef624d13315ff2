"""Weights quantized and dequantized in the slots of several ranks: the values of one rank."""

import pytest
import torch

from pipeline.evaluation.weights import ServedWeights
from pipeline.mcore import backend
from pipeline.runtime.collectives import Ranks
from pipeline.sharding import ParallelDims
from tests.distributed.helpers import run_ranks
from tests.unit.evaluation.test_weights import (
    Choose,
    assert_holds,
    fill,
    flushed,
    schedules,
    slots_of,
    stored,
)
from tests.unit.test_packing import ARCHITECTURE, mixed, swapped

CPU = torch.device("cpu")
LAYOUTS = [
    {"world": 4, "tp": 4, "ep": 2, "etp": 2},  # two ranks share each key/value head
    {"world": 4, "tp": 1, "etp": 4},
    {"world": 4, "tp": 2, "ep": 1, "etp": 2},
]


def check(rank: int, choose: Choose) -> None:
    by_name = stored(choose)
    values = {name: pair[0] for name, pair in by_name.items()}
    after = {name: flushed(*pair) for name, pair in by_name.items()}
    for degrees in LAYOUTS:
        dims = ParallelDims(**degrees)
        groups = backend.start(dims, rank, CPU)
        ranks = Ranks(groups.world, groups.tp, groups.etp, CPU)
        slots = slots_of(dims, rank, groups)
        for schedule in schedules(choose, dims):
            slot = slots[schedule.layer_type]
            fill(slot, schedule.layer)
            served = ServedWeights(schedule, slot, ARCHITECTURE, dims, ranks, "reference")
            served.dequantize()
            assert_holds(slot, schedule.layer, values, dims, rank)
            served.flush()
            assert_holds(slot, schedule.layer, after, dims, rank)


@pytest.mark.slow
@pytest.mark.parametrize("choose", [mixed, swapped])
def test_four_ranks_hold_their_parts_of_the_same_values(choose: Choose) -> None:
    run_ranks(check, 4, choose)
