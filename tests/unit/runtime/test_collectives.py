"""Collectives over real ranks, and as no-ops on one."""

from typing import Any

import torch
import torch.distributed as dist

from pipeline.runtime.collectives import (
    Ranks,
    barrier,
    broadcast_object,
    gather_bytes,
    gather_objects,
    reduce_max,
    reduce_sum,
    size,
)
from tests.distributed.helpers import run_ranks

NAN, INF = float("nan"), float("inf")


def test_one_rank_needs_no_group() -> None:
    values = torch.tensor([1.0, NAN, -INF])
    assert reduce_max(values, None).tolist() == [1.0, INF, INF]
    total = reduce_sum(torch.tensor([1.5], dtype=torch.float32), None)
    assert (total.dtype, total.tolist()) == (torch.float64, [1.5])
    part = torch.ones(2)
    (only,) = gather_bytes(part, 0, None) or []
    assert only is part
    assert gather_objects("x", None) == ["x"]
    assert broadcast_object("x", None) == "x"
    barrier(None)
    ranks = Ranks(None, None, None, torch.device("cpu"))
    assert (ranks.rank, ranks.size, size(None)) == (0, 1, 1)


def test_the_input_of_a_sum_is_left_alone() -> None:
    values = torch.ones(2, dtype=torch.float64)
    reduce_sum(values, None).add_(1)
    assert values.tolist() == [1.0, 1.0]


def on_rank(rank: int) -> dict[str, Any]:
    world = dist.group.WORLD
    ranks = Ranks(world, None, None, torch.device("cpu"))
    bfloat = torch.tensor([1.0 + rank, -3.0], dtype=torch.bfloat16)
    mixed = torch.tensor([1.0, NAN if rank == 1 else 9.0])
    codes = torch.full((2, 3), rank, dtype=torch.uint8)
    scales = (torch.full((3, 2), 0.5 + rank).T).to(torch.float8_e4m3fn)  # not contiguous
    gathered = {}
    for owner in (0, 2):
        for name, part in (("codes", codes), ("scales", scales)):
            pieces = gather_bytes(part, owner, world)
            if pieces is not None:
                assert all(p.dtype is part.dtype and p.shape == part.shape for p in pieces)
                gathered[name, owner] = [p.float().tolist() for p in pieces]
    barrier(world)
    return {
        "place": (ranks.rank, ranks.size),
        "max": reduce_max(bfloat, world).tolist(),
        "nan": reduce_max(mixed, world).tolist(),
        "sum": reduce_sum(torch.tensor([1e-9 if rank else 1e9]), world).tolist(),
        "empty": reduce_max(torch.empty(0), world).numel(),
        "gathered": gathered,
        "objects": gather_objects({"rank": rank}, world),
        "from_0": broadcast_object(["rank", rank], world),
    }


def test_three_ranks() -> None:
    results = run_ranks(on_rank, 3)
    for rank, found in enumerate(results):
        assert found["place"] == (rank, 3)
        assert found["max"] == [3.0, -3.0]
        assert found["nan"] == [1.0, INF]
        assert found["sum"] == [float(torch.tensor(1e9)) + 2 * float(torch.tensor(1e-9))]
        assert found["empty"] == 0
        assert found["from_0"] == ["rank", 0]
        assert found["objects"] == ([{"rank": r} for r in range(3)] if rank == 0 else [])
        wanted = {}
        if rank in (0, 2):
            wanted["codes", rank] = [[[float(r)] * 3] * 2 for r in range(3)]
            wanted["scales", rank] = [[[0.5 + r] * 3] * 2 for r in range(3)]
        assert found["gathered"] == wanted
