"""All routed experts of this rank in two stacked weights.

In: tokens sorted by expert, how many each expert got, their router probabilities. Out: each
token's expert output, already weighted. The probability is applied *after* down_proj, as servers
do; megatron's own experts apply it before, which would distort down_proj's observed input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.tap import Probe


class StackedExperts(nn.Module):
    """`up_proj` [E_local, F/etp, H] and `down_proj` [E_local, H, F/etp]; H is the latent width."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        architecture: Architecture,
        device: torch.device,
        probe: Probe,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__()
        width = architecture.moe_intermediate_size // pg_collection.expt_tp.size()
        inputs, dtype = architecture.expert_input_size, config.params_dtype
        self.probe = probe
        self.up_proj = nn.Parameter(
            torch.empty(num_local_experts, width, inputs, device=device, dtype=dtype)
        )
        self.down_proj = nn.Parameter(
            torch.empty(num_local_experts, inputs, width, device=device, dtype=dtype)
        )

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Tokens [rows, H] sorted by expert, counts [E_local] and fp32 probs [rows]; out [rows, H].

        With ETP the output is this rank's partial sum; the dispatcher adds them up.
        """
        assert int(tokens_per_expert.sum()) == tokens.shape[0], "a token without an expert"
        self.probe.activation("experts.up_proj", tokens)
        inner = F.relu(multiply_by_expert(tokens, self.up_proj, tokens_per_expert)).square_()
        self.probe.activation("experts.down_proj", inner)
        output = multiply_by_expert(inner, self.down_proj, tokens_per_expert)
        return output.mul_(probs.unsqueeze(-1)), None  # multiplied in fp32, then rounded once


def multiply_by_expert(
    rows: torch.Tensor, weight_ENK: torch.Tensor, rows_per_expert: torch.Tensor
) -> torch.Tensor:
    """Each row [K] times its own expert's weight: [rows, N]. An expert may have no rows.

    One grouped product on CUDA in bf16; a loop elsewhere.
    """
    if rows.is_cuda and rows.dtype is torch.bfloat16 and rows.shape[0] > 0:
        ends = rows_per_expert.cumsum(0).to(device=rows.device, dtype=torch.int32)
        return F.grouped_mm(rows, weight_ENK.transpose(1, 2), offs=ends)
    output = rows.new_empty(rows.shape[0], weight_ENK.shape[1])
    start = 0
    for expert, count in enumerate(rows_per_expert.tolist()):
        output[start : start + count] = F.linear(rows[start : start + count], weight_ENK[expert])
        start += count
    return output
