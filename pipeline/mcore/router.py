"""The router of an MoE layer: which experts each token goes to, and with what probability.

In: tokens [tokens, hidden]. Out: the experts of each token, in ascending order, and their
probabilities. Logits are as good as fp32 whatever the compute dtype: a near tie between two experts
is decided by their last bits.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.kernels.routing import choose_experts, largest, router_logits, weigh_experts


class Router(nn.Module):
    """Sigmoid scores; experts are chosen by score plus correction bias, weighted by score alone.

    Attributes:
        weight: [experts, hidden], in the dtype of the source once it is filled.
        expert_bias: Correction bias, fp32 [experts].
    """

    expert_bias: torch.Tensor

    def __init__(
        self, architecture: Architecture, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.weight = nn.Parameter(
            torch.empty(a.n_routed_experts, a.hidden_size, device=device, dtype=dtype)
        )
        bias = torch.empty(a.n_routed_experts, device=device, dtype=torch.float32)
        self.register_buffer("expert_bias", bias)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts, int32 [tokens, top_k], ascending in each row, and their fp32 probabilities."""
        a = self.architecture
        top_k, normalizes = a.num_experts_per_tok, a.norm_topk_prob
        scaling = a.routed_scaling_factor
        logits_TE = router_logits(tokens, self.weight)
        if a.n_group == 1:
            return choose_experts(
                logits_TE, self.expert_bias, top_k, normalizes=normalizes, scaling=scaling
            )
        scores_TE = torch.sigmoid(logits_TE)
        choice_TE = keep_best_groups(scores_TE + self.expert_bias, a.n_group, a.topk_group)
        chosen_TK = largest(choice_TE, top_k)
        return weigh_experts(scores_TE, chosen_TK, normalizes=normalizes, scaling=scaling)


def keep_best_groups(choice_TE: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """Sets to -inf all experts outside the `kept` best groups of consecutive experts.

    A group is as good as the sum of its two best experts (transformers' and the servers' rule).
    """
    choice_TGE = choice_TE.unflatten(1, (groups, -1))
    worth_TG = choice_TGE.topk(2, dim=-1).values.sum(dim=-1)
    is_kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    is_kept_TG.scatter_(1, largest(worth_TG, kept), True)
    kept_TGE: torch.Tensor = choice_TGE.masked_fill(~is_kept_TG.unsqueeze(-1), -torch.inf)
    return kept_TGE.flatten(1)
