"""All routed experts of this rank in two stacked weights.

In: tokens, the experts they chose, their probabilities. Out: per token, the sum of the local
experts' outputs. The probability is applied *after* down_proj, as servers do; megatron's own
experts apply it before, which would distort down_proj's observed input.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.dispatch import sort_by_expert
from pipeline.mcore.kernels.combine import combine, spread
from pipeline.mcore.kernels.grouped_mm import grouped_mm
from pipeline.mcore.tap import Probe


class StackedExperts(nn.Module):
    """`up_proj` [E_local, F/etp, H] and `down_proj` [E_local, H, F/etp]; H is the latent width."""

    def __init__(
        self,
        architecture: Architecture,
        pg_collection: ProcessGroupCollection,
        probe: Probe,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.local = architecture.n_routed_experts // pg_collection.ep.size()
        self.first = self.local * pg_collection.ep.rank()
        self.holds_all = pg_collection.ep.size() == 1
        self.probe = probe
        width = architecture.moe_intermediate_size // pg_collection.expt_tp.size()
        inputs = architecture.expert_input_size
        self.up_proj = nn.Parameter(
            torch.empty(self.local, width, inputs, device=device, dtype=dtype)
        )
        self.down_proj = nn.Parameter(
            torch.empty(self.local, inputs, width, device=device, dtype=dtype)
        )

    def forward(
        self,
        tokens: torch.Tensor,
        chosen_TK: torch.Tensor,
        probs_TK: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Sums over the local experts, in ascending order, rounded from fp32 to `dtype`.

        Args:
            tokens: [tokens, H].
            chosen_TK: Experts of each token, int32, in ascending order.
            probs_TK: Their probabilities, fp32.
            dtype: fp32 where other ranks' sums (other experts, or with ETP the rest of the same
                ones) are to be added.

        Returns:
            [tokens, H].
        """
        order = sort_by_expert(chosen_TK, self.first, self.local, holds_all=self.holds_all)
        rows = spread(tokens, order.position_TK, order.groups.rows)
        inner = grouped_mm(
            rows,
            self.up_proj,
            order.groups,
            squares_relu=True,
            amax=self.probe.amax_of("experts.down_proj"),
        )
        del rows  # its memory is what the next product is written to
        inner = self.probe.quantize("experts.down_proj", inner)
        output = grouped_mm(inner, self.down_proj, order.groups)
        del inner
        return combine(output, order.position_TK, probs_TK, dtype)
