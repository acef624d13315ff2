"""The MoE layer's Triton kernels on a CPU (`interpreted_kernels` runs them).

Triton's interpreter cannot multiply matrices in bf16: fp16 and fp32 stand for it.
"""

import math

import torch

from pipeline.mcore.kernels import combine, grouped_mm, routing


def check_moe_kernels() -> None:
    _check_choice()
    _check_logits()
    _check_rows()
    _check_grouped_mm()


def _check_choice() -> None:
    for experts, top_k, normalizes in ((8, 3, True), (33, 5, False), (512, 22, True), (8, 8, True)):
        logits_TE, bias_E = torch.randn(6, experts), 0.1 * torch.randn(experts)
        logits_TE[0], bias_E[1:5] = 0.25, 0.0  # ties
        logits_TE[1, 3] = torch.nan
        choice = {"normalizes": normalizes, "scaling": 2.5}
        chosen_TK, probs_TK = routing._choose_on_gpu(logits_TE, bias_E, top_k, *choice.values())
        expected = routing.choose_experts(logits_TE, bias_E, top_k, **choice)
        assert torch.equal(chosen_TK, expected[0])
        torch.testing.assert_close(probs_TK, expected[1], rtol=1e-6, atol=0.0, equal_nan=True)


def _check_logits() -> None:
    tokens, parts_PEH = torch.randn(130, 72), torch.randn(3, 20, 72)
    expected = tokens @ parts_PEH.sum(0).T
    torch.testing.assert_close(routing._multiply_on_gpu(tokens, parts_PEH), expected)


def _check_rows() -> None:
    position_TK = torch.tensor([[3, -1, 0], [1, 2, -1], [-1, -1, -1]], dtype=torch.int32)
    tokens, probs_TK, rows = torch.randn(3, 2100), torch.rand(3, 3), torch.randn(4, 2100)
    spread_out = combine._spread_on_gpu(tokens, position_TK, 4)
    assert torch.equal(spread_out, combine.spread(tokens, position_TK, 4))
    combined = combine._combine_on_gpu(rows, position_TK, probs_TK, torch.float32)
    expected = combine.combine(rows, position_TK, probs_TK, torch.float32)
    torch.testing.assert_close(combined, expected)


def _check_grouped_mm() -> None:
    for counts, width, depth in (([0, 5, 130, 1], 40, 24), ([150, 0, 2], 264, 72), ([1], 256, 8)):
        offsets = torch.tensor([0, *counts]).cumsum(0)
        total = sum(counts)
        groups = grouped_mm.RowGroups(offsets, total, *grouped_mm._list_tiles(offsets, total))
        rows = torch.randn(total, depth).half()
        weight_ENK = torch.randn(len(counts), width, depth).half()
        amax = torch.zeros(1)
        plain = grouped_mm._multiply_on_gpu(rows, weight_ENK, groups, False, None, 3)
        squared = grouped_mm._multiply_on_gpu(rows, weight_ENK, groups, True, amax, 3)
        expected = grouped_mm._loop_over_experts(rows, weight_ENK, offsets)
        torch.testing.assert_close(plain, expected, rtol=2e-3, atol=2e-3)
        assert torch.equal(squared, plain.relu().square())
        assert amax == squared.float().max()
        rows[-1, 0] = torch.nan
        grouped_mm._multiply_on_gpu(rows, weight_ENK, groups, True, amax, 3)
        assert amax == math.inf
