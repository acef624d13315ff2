"""An MoE layer: router, routed experts in the latent width, shared expert.

In: [seq/tp, batch, hidden]. Out: the same. Routed experts live on the data-parallel ranks; shared
experts are dense and cut over tp. One rank computes a layer without ever waiting for its device.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.dispatch import Exchange
from pipeline.mcore.experts import StackedExperts
from pipeline.mcore.kernels.activation import raise_amax
from pipeline.mcore.linear import FeedForward
from pipeline.mcore.router import Router
from pipeline.mcore.tap import Probe


class MoE(nn.Module):
    """Nemotron-H's MoE layer over megatron's process groups.

    Megatron's own would send every token once for each of its experts, apply probabilities before
    down_proj, combine with atomic additions, and need Transformer Engine for the latent width.
    """

    shared_experts: FeedForward | None
    fc1_latent_proj: nn.Linear | None
    fc2_latent_proj: nn.Linear | None

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        probe: Probe,
        device: torch.device,
    ) -> None:
        super().__init__()
        a, dtype = architecture, config.params_dtype
        self.probe, self.has_bias = probe, a.mlp_bias
        self.exchange = Exchange(pg_collection.tp_ep)
        self.router = Router(a, device=device, dtype=dtype)
        self.experts = StackedExperts(a, pg_collection, probe, device=device, dtype=dtype)
        self.shared_experts = self.fc1_latent_proj = self.fc2_latent_proj = None
        if a.has_shared_experts:
            self.shared_experts = FeedForward(
                a.moe_shared_expert_intermediate_size,
                bias=a.mlp_bias,
                probe=probe,
                prefix="shared_experts.",
                config=config,
                pg_collection=pg_collection,
            )
        if a.moe_latent_size is not None:
            self.fc1_latent_proj, self.fc2_latent_proj = (
                nn.Linear(inputs, outputs, bias=a.mlp_bias, device=device, dtype=dtype)
                for inputs, outputs in (
                    (a.hidden_size, a.moe_latent_size),
                    (a.moe_latent_size, a.hidden_size),
                )
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same.

        With several ranks, tokens travel while the router computes, and the experts' sums while the
        shared expert does.
        """
        tokens = hidden.flatten(0, 1)
        latents = tokens
        if self.fc1_latent_proj is not None:
            latents = self.fc1_latent_proj(self.probe.quantize("fc1_latent_proj", tokens))
        self._raise_amax("experts.up_proj", latents)  # every token goes to some expert
        # Before the exchange: once for each token, not for each of its experts.
        travelling = self.exchange.gather(self.probe.quantize("experts.up_proj", latents))
        chosen_TK, probs_TK = self.router(tokens)
        self.probe.routing(chosen_TK)
        chosen, probs = self.exchange.gather(chosen_TK), self.exchange.gather(probs_TK)
        combined = self.experts(
            travelling.wait(),
            chosen.wait(),
            probs.wait(),
            hidden.dtype if self.exchange.size == 1 else torch.float32,
        )
        travelling = self.exchange.sum_to_owners(combined)
        shared = None if self.shared_experts is None else self.shared_experts(hidden)
        combined = travelling.wait().to(hidden.dtype)
        return self._add(combined, shared).view_as(hidden)

    def _add(self, combined: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        """Routed experts' sums [tokens, H], back in the hidden width, plus the shared expert's."""
        total = None if shared is None else shared.flatten(0, 1)
        projection = self.fc2_latent_proj
        if projection is None:
            return combined if total is None else total.add_(combined)
        self._raise_amax("fc2_latent_proj", combined)
        combined = self.probe.quantize("fc2_latent_proj", combined)
        if total is None or self.has_bias:
            routed: torch.Tensor = projection(combined)
            return routed if total is None else total.add_(routed)
        # Added to the product before it is rounded: once, and in the same pass over memory.
        return total.addmm_(combined, projection.weight.T)

    def _raise_amax(self, projection: str, x: torch.Tensor) -> None:
        amax = self.probe.amax_of(projection)
        if amax is not None:
            raise_amax(x, amax)
