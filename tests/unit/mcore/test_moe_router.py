"""Which experts a token goes to, and how logits keep the bits of an fp32 weight."""

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.mcore.kernels.routing import choose_experts, largest, router_logits, split_in_bf16
from pipeline.mcore.router import Router
from tests.unit.mcore.models import BASE

PLAIN: dict[str, Any] = {"normalizes": False, "scaling": 1.0}


def test_equal_scores_go_to_the_lower_index() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert largest(values, 2).tolist() == [[1, 2], [0, 1]]
    chosen_TK, _ = choose_experts(values, torch.zeros(5), 3, **PLAIN)
    assert chosen_TK.tolist() == [[1, 2, 4], [0, 1, 2]]


def test_the_bias_chooses_and_the_score_weighs() -> None:
    logits_TE = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    bias_E = torch.tensor([0.0, -1.0, 0.0, 1.0])
    chosen_TK, probs_TK = choose_experts(logits_TE, bias_E, 2, normalizes=True, scaling=2.5)
    assert chosen_TK.dtype is torch.int32
    assert chosen_TK.tolist() == [[2, 3]]  # ascending, though 3 is the better one
    scores = torch.sigmoid(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(probs_TK, (2.5 * scores / scores.sum()).unsqueeze(0))


def test_nan_is_chosen_and_every_token_has_distinct_experts() -> None:
    logits_TE = torch.full((2, 6), torch.nan)
    logits_TE[1] = torch.tensor([1.0, 2.0, torch.nan, 0.0, 3.0, 1.0])
    chosen_TK, _ = choose_experts(logits_TE, torch.zeros(6), 3, **PLAIN)
    assert chosen_TK.tolist() == [[0, 1, 2], [1, 2, 4]]


def test_three_bf16_parts_are_the_weight() -> None:
    torch.manual_seed(3)
    weight = torch.randn(64, 64) * 10.0 ** torch.randint(-6, 6, (64, 64))
    parts = split_in_bf16(weight)
    assert parts.dtype is torch.bfloat16
    assert parts.shape == (3, 64, 64)
    assert torch.equal(parts.double().sum(0), weight.double())
    assert torch.equal(split_in_bf16(weight.bfloat16()), weight.bfloat16().unsqueeze(0))


def test_logits_are_fp32_whatever_comes_in() -> None:
    torch.manual_seed(3)
    tokens, weight_EH = torch.randn(5, 64).bfloat16(), torch.randn(8, 64)
    expected = tokens.float() @ weight_EH.T
    assert torch.equal(router_logits(tokens, weight_EH), expected)
    halved = weight_EH.bfloat16()
    assert router_logits(tokens, halved).dtype is torch.float32


@pytest.mark.parametrize("n_group", [1, 4])
def test_router_is_transformers_rule(n_group: int) -> None:
    torch.manual_seed(3)
    a = Architecture.from_hf_config({**BASE, "n_group": n_group, "topk_group": n_group // 2 or 1})
    a = dataclasses.replace(a, num_experts_per_tok=3)
    router = Router(a, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(False)
    router.weight.normal_()
    router.expert_bias.normal_(0.0, 0.2)
    tokens = torch.randn(9, a.hidden_size)
    chosen_TK, probs_TK = router(tokens)

    scores_TE = torch.sigmoid(tokens @ router.weight.T)
    choice_TGE = (scores_TE + router.expert_bias).unflatten(1, (n_group, -1))
    best_TG = choice_TGE.topk(2).values.sum(-1).topk(a.topk_group).indices
    is_kept_TG = torch.zeros(9, n_group, dtype=torch.bool).scatter_(1, best_TG, True)
    choice_TE = choice_TGE.masked_fill(~is_kept_TG.unsqueeze(-1), 0.0).flatten(1)
    expected_TK = choice_TE.topk(3).indices.sort().values
    assert torch.equal(chosen_TK, expected_TK.int())
    probs = scores_TE.gather(1, expected_TK)
    torch.testing.assert_close(probs_TK, probs / probs.sum(1, keepdim=True) * 2.5)
