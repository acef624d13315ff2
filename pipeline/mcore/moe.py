"""Megatron's MoE layer with our router, stacked experts, fixed-order dispatcher and latents.

In: [seq/tp, batch, hidden]. Out: the same. Routed experts live on the data-parallel ranks; shared
experts are dense and cut over tp.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.dispatch import FixedOrderAllGatherDispatcher, FixedOrderAllToAllDispatcher
from pipeline.mcore.experts import StackedExperts
from pipeline.mcore.linear import FeedForward
from pipeline.mcore.router import Router
from pipeline.mcore.tap import Probe


class MoE(MoELayer):
    """Adds the latent projections itself: megatron's need Transformer Engine."""

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        probe: Probe,
        device: torch.device,
    ) -> None:
        a = architecture
        super().__init__(
            config,
            _submodules(a, probe, device),
            layer_number=1,
            pg_collection=pg_collection,
        )
        dispatcher = (
            FixedOrderAllToAllDispatcher
            if config.moe_token_dispatcher_type == "alltoall"
            else FixedOrderAllGatherDispatcher
        )
        self.token_dispatcher = dispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
        )
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if a.moe_latent_size is not None:
            linear = functools.partial(
                nn.Linear, bias=a.mlp_bias, device=device, dtype=config.params_dtype
            )
            self.fc1_latent_proj = linear(a.hidden_size, a.moe_latent_size)
            self.fc2_latent_proj = linear(a.moe_latent_size, a.hidden_size)
            probe.watch_input(self.fc1_latent_proj, "fc1_latent_proj")
            probe.watch_input(self.fc2_latent_proj, "fc2_latent_proj")
        probe.watch_routing(self.router)

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> Any:
        """What the dispatcher sends: tokens in the latent width, where there is one."""
        if self.fc1_latent_proj is not None:
            hidden_states = self.fc1_latent_proj(hidden_states)
        return self.token_dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)

    def postprocess(
        self, output: torch.Tensor, shared_expert_output: torch.Tensor | None
    ) -> torch.Tensor:
        """Combined routed experts, back in the hidden width, plus the shared expert."""
        combined: torch.Tensor = self.token_dispatcher.combine_postprocess(output)
        if self.fc2_latent_proj is not None:
            combined = self.fc2_latent_proj(combined)
        return combined if shared_expert_output is None else combined + shared_expert_output

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same."""
        output: torch.Tensor = super().forward(hidden)[0]
        return output


def _submodules(a: Architecture, probe: Probe, device: torch.device) -> MoESubmodules:
    shared = functools.partial(
        FeedForward,
        a.moe_shared_expert_intermediate_size,
        bias=a.mlp_bias,
        probe=probe,
        prefix="shared_experts.",
    )
    return MoESubmodules(
        experts=functools.partial(StackedExperts, architecture=a, device=device, probe=probe),
        shared_experts=shared if a.has_shared_experts else None,
        router=functools.partial(Router, architecture=a),
    )
