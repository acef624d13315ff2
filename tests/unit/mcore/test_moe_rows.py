"""Tokens to rows sorted by expert, to the experts, and back; what travels between ranks."""

import pytest
import torch
import torch.distributed as dist

from pipeline.mcore.dispatch import Exchange, RowOrder, sort_by_expert
from pipeline.mcore.kernels.combine import combine, spread
from pipeline.mcore.kernels.grouped_mm import group_rows, grouped_mm
from tests.distributed.helpers import run_ranks


def _choose(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    choice_TE = torch.rand(tokens, experts)
    choice_TE[:, experts // 2] = 0.0  # an expert without tokens, unless all are chosen
    return choice_TE.topk(top_k).indices.sort().values.int()


def _order(chosen_TK: torch.Tensor, first: int, local: int, experts: int) -> RowOrder:
    return sort_by_expert(chosen_TK, first, local, holds_all=local == experts)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "first", "local"),
    [(1, 1, 1, 0, 1), (7, 5, 2, 0, 5), (9, 8, 8, 0, 8), (30, 8, 3, 4, 4), (2, 8, 1, 4, 1)],
)
def test_rows_are_sorted_by_expert_and_token(
    tokens: int, experts: int, top_k: int, first: int, local: int
) -> None:
    torch.manual_seed(3)
    chosen_TK = _choose(tokens, experts, top_k)
    order = _order(chosen_TK, first, local, experts)
    offsets = order.groups.offsets.tolist()
    row = 0
    for expert in range(first, first + local):
        assert offsets[expert - first] == row
        for token, choice in (chosen_TK == expert).nonzero().tolist():
            assert order.position_TK[token, choice] == row
            row += 1
    assert offsets[-1] == order.groups.rows == row
    assert (order.position_TK >= 0).sum() == row


def test_rows_are_copies_and_their_weighted_sum_ascends_over_experts() -> None:
    torch.manual_seed(3)
    chosen_TK = _choose(12, 8, 3)
    order = _order(chosen_TK, 4, 4, 8)
    tokens, probs_TK = torch.randn(12, 5), torch.rand(12, 3)
    rows = spread(tokens, order.position_TK, order.groups.rows)
    expected = torch.zeros(12, 5)
    for token in range(12):
        for choice, position in enumerate(order.position_TK[token].tolist()):
            if position >= 0:
                assert torch.equal(rows[position], tokens[token])
                expected[token] += probs_TK[token, choice] * rows[position]
    assert torch.equal(combine(rows, order.position_TK, probs_TK, torch.float32), expected)
    rounded = combine(rows.bfloat16(), order.position_TK, probs_TK, torch.bfloat16)
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, rtol=2e-2, atol=2e-2)


def test_each_row_meets_its_own_expert() -> None:
    torch.manual_seed(3)
    rows, weight_ENK = torch.randn(6, 4), torch.randn(4, 3, 4)
    counts = torch.tensor([2, 0, 3, 1])
    groups = group_rows(torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))), 6)
    experts = torch.arange(4).repeat_interleave(counts)
    expected = torch.einsum("rk,rnk->rn", rows, weight_ENK[experts])
    torch.testing.assert_close(grouped_mm(rows, weight_ENK, groups), expected)
    amax = torch.zeros(1)
    squared = grouped_mm(rows, weight_ENK, groups, squares_relu=True, amax=amax)
    torch.testing.assert_close(squared, expected.relu().square())
    assert amax == squared.max()


def test_no_rows_at_all() -> None:
    order = _order(torch.tensor([[0, 1], [1, 3]], dtype=torch.int32), 4, 4, 8)
    rows = spread(torch.randn(2, 4), order.position_TK, order.groups.rows)
    assert rows.shape == (0, 4)
    output = grouped_mm(rows, torch.randn(4, 4, 4), order.groups)
    assert not combine(output, order.position_TK, torch.rand(2, 2), torch.float32).any()


def test_one_rank_sends_nothing() -> None:
    def run(rank: int) -> bool:
        group = dist.new_group([rank], use_local_synchronization=True)
        exchange, x = Exchange(group), torch.ones(3, 2)
        return exchange.gather(x).wait() is x and exchange.sum_to_owners(x).wait() is x

    assert run_ranks(run, 2) == [True, True]


def test_ranks_see_all_tokens_and_get_back_the_sums_of_their_own() -> None:
    def run(rank: int) -> tuple[list[float], list[float]]:
        exchange = Exchange(dist.group.WORLD)
        with torch.inference_mode():
            own = torch.tensor([[10.0 * rank], [10.0 * rank + 1]])
            pending = exchange.gather(own)
            gathered = pending.wait()
            summed = exchange.sum_to_owners(gathered * (rank + 1)).wait()
        return gathered.flatten().tolist(), summed.flatten().tolist()

    for rank, (gathered, summed) in enumerate(run_ranks(run, 3)):
        assert gathered == [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]
        assert summed == [60.0 * rank, 60.0 * rank + 6.0]
