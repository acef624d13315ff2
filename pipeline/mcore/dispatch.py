"""Megatron's token dispatchers, with experts' outputs combined in a fixed order.

In: expert outputs, sorted by expert. Out: their sum per token. Megatron adds them with
`scatter_add_`, which on CUDA means atomics: another order, and other last bits, in every run.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)


class FixedOrderAllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Every rank of the expert grid sees all tokens (gloo)."""

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Local experts' outputs [rows, H] to fp32 partial sums [all tokens, H]."""
        self.compute_dtype = hidden_states.dtype
        return combine_in_order(
            hidden_states,
            self.reversed_local_input_permutation_mapping,
            self.local_map,
            self.router_topk,
        )

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sums over all experts, fp32, to [seq/tp, batch, H] in the compute dtype."""
        return hidden_states.to(self.compute_dtype).view(self.hidden_shape)


class FixedOrderAllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Tokens travel to the ranks that own their experts (NCCL)."""

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Outputs of all experts of this rank's tokens to [seq/tp, batch, H]."""
        rows = permutated_local_input_tokens
        combined = combine_in_order(
            rows,
            self.reversed_local_input_permutation_mapping,
            self.routing_map,
            self.config.moe_router_topk,
        )
        return combined.to(rows.dtype).view(self.hidden_shape)


def combine_in_order(
    rows: torch.Tensor, token_of_row: torch.Tensor, routing_map: torch.Tensor, top_k: int
) -> torch.Tensor:
    """fp32 [tokens, H]: the sum of each token's rows, in ascending order of experts.

    Args:
        rows: [n, H], sorted by expert, and by token within an expert.
        token_of_row: Index of the token that each row belongs to, [n].
        routing_map: Bool [tokens, experts]; its sum is n.
        top_k: Most rows that a token can have.
    """
    tokens = routing_map.shape[0]
    total = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    if rows.shape[0] == 0:
        return total
    counts = routing_map.sum(dim=1)
    first = counts.cumsum(0) - counts
    by_token = token_of_row.argsort(stable=True)
    for turn in range(min(top_k, routing_map.shape[1])):
        # Tokens with fewer rows read some other token's and do not add it: no data-dependent shape.
        picked = by_token[(first + turn).clamp_(max=rows.shape[0] - 1)]
        has_row = (counts > turn).unsqueeze(-1)
        total += torch.where(has_row, rows[picked].float(), 0.0)
    return total
