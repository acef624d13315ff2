"""The pieces under the slots, each against a plain formulation."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.mcore.dispatch import combine_in_order
from pipeline.mcore.experts import multiply_by_expert
from pipeline.mcore.norms import GatedRMSNorm, RMSNorm
from pipeline.mcore.router import keep_best_groups, largest
from pipeline.mcore.ssd import mamba_chunk_scan_combined

CPU = torch.device("cpu")


def _recurrence(x, dt, A, B, C):  # type: ignore[no-untyped-def]
    """The definition, position by position, in fp64."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    repeats = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeats, 2), C.repeat_interleave(repeats, 2)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        added = torch.einsum("bhp,bhn->bhpn", x[:, t] * dt[:, t, :, None], B[:, t])
        state = state * (dt[:, t] * A).exp()[..., None, None] + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 16, 29, 64])
def test_scan_is_the_recurrence_whatever_the_chunk_size(chunk_size: int) -> None:
    torch.manual_seed(3)
    x, dt = torch.randn(2, 29, 6, 4), torch.randn(2, 29, 6)
    B, C = torch.randn(2, 29, 3, 5), torch.randn(2, 29, 3, 5)
    A, D, dt_bias = -torch.rand(6) * 8, torch.randn(6), torch.randn(6)
    y = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True
    )
    expected = _recurrence(x, F.softplus(dt + dt_bias), A, B, C) + x.double() * D[:, None]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_scan_keeps_the_dtype_and_computes_in_fp32() -> None:
    torch.manual_seed(3)
    x, B, C = (torch.randn(1, 9, 2, 4).bfloat16() for _ in range(3))
    dt, A = torch.rand(1, 9, 2).bfloat16(), -torch.rand(2)
    y = mamba_chunk_scan_combined(x, dt, A, B, C, 4)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, _recurrence(x, dt, A, B, C).to(torch.bfloat16))


def test_norms() -> None:
    torch.manual_seed(3)
    x, z = torch.randn(3, 2, 12) * 5, torch.randn(3, 2, 12)
    norm = RMSNorm(12, 1e-3, device=CPU, dtype=torch.float32)
    norm.weight.data.normal_()
    torch.testing.assert_close(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-3))
    gated = GatedRMSNorm(12, 1e-3, group_size=4, device="cpu", dtype=torch.float32)
    gated.weight.data.normal_()
    parts = (x * F.silu(z)).split(4, dim=-1)
    expected = torch.cat([F.rms_norm(part, (4,), eps=1e-3) for part in parts], -1) * gated.weight
    torch.testing.assert_close(gated(x, z), expected)
    assert norm(x.bfloat16()).dtype is gated(x.bfloat16(), z).dtype is torch.bfloat16


def test_equal_scores_go_to_the_lower_index() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert largest(values, 2).tolist() == [[1, 2], [0, 1]]


def test_groups_are_chosen_by_their_two_best() -> None:
    choice = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.0, 0.4, 0.4, 0.4]])
    kept = keep_best_groups(choice, groups=3, kept=2)  # 0.9, 1.0 and 0.8
    assert kept.isneginf().tolist() == [[False] * 6 + [True] * 3]
    assert torch.equal(kept[:, :6], choice[:, :6])


def test_combine_sums_each_tokens_rows_in_the_order_of_experts() -> None:
    torch.manual_seed(3)
    routing_map = torch.rand(7, 5) < 0.5
    routing_map[2] = False  # none of this token's experts is local
    token_of_row = routing_map.T.nonzero()[:, 1]
    rows = torch.randn(token_of_row.shape[0], 3)
    expected = torch.zeros(7, 3)
    for row, token in zip(rows, token_of_row, strict=True):
        expected[token] += row
    assert torch.equal(combine_in_order(rows, token_of_row, routing_map, 5), expected)
    nothing = combine_in_order(rows[:0], token_of_row[:0], torch.zeros(7, 5).bool(), 5)
    assert torch.equal(nothing, torch.zeros(7, 3))


def test_each_row_meets_its_own_expert() -> None:
    torch.manual_seed(3)
    rows, weight = torch.randn(6, 4), torch.randn(4, 3, 4)
    counts = torch.tensor([2, 0, 3, 1])
    experts = torch.arange(4).repeat_interleave(counts)
    expected = torch.einsum("rk,rnk->rn", rows, weight[experts])
    torch.testing.assert_close(multiply_by_expert(rows, weight, counts), expected)
