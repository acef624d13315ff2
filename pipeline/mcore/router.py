"""Megatron's top-k router with Nemotron-H's group selection and a defined order on ties.

In: [seq/tp, batch, hidden]. Out: probabilities fp32 [tokens, experts] (zero where not routed) and
the routing map, bool [tokens, experts]; row = position * batch + sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter

from pipeline.architecture import Architecture


class Router(TopKRouter):
    """Sigmoid scores; experts are chosen by score plus correction bias, weighted by score alone."""

    def __init__(self, *, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architecture = architecture

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits fp32: input and weight are widened first, whatever dtype the source gave them."""
        return F.linear(input.float(), self.weight.float())

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and routing map from logits [..., experts]."""
        assert padding_mask is None
        a = self.architecture
        scores_TE = torch.sigmoid(logits.flatten(0, -2))
        choice_TE = scores_TE + self.expert_bias
        if a.n_group > 1:
            choice_TE = keep_best_groups(choice_TE, a.n_group, a.topk_group)
        chosen_TK = largest(choice_TE, a.num_experts_per_tok)
        probs_TK = scores_TE.gather(1, chosen_TK)
        if a.norm_topk_prob:
            probs_TK = probs_TK / (probs_TK.sum(dim=-1, keepdim=True) + 1e-20)
        probs_TK = probs_TK * a.routed_scaling_factor
        routing_map = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
        return torch.zeros_like(scores_TE).scatter_(1, chosen_TK, probs_TK), routing_map


def keep_best_groups(choice_TE: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """Sets to -inf all experts outside the `kept` best groups of consecutive experts.

    A group is as good as the sum of its two best experts (transformers' and the servers' rule;
    megatron sums the best topk / kept instead).
    """
    choice_TGE = choice_TE.unflatten(1, (groups, -1))
    worth_TG = choice_TGE.topk(2, dim=-1).values.sum(dim=-1)
    is_kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    is_kept_TG.scatter_(1, largest(worth_TG, kept), True)
    kept_TGE: torch.Tensor = choice_TGE.masked_fill(~is_kept_TG.unsqueeze(-1), -torch.inf)
    return kept_TGE.flatten(1)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest along the last dim; of equals, the lower index first.

    torch.topk leaves the order of equals open; a stable sort defines it on every device.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
