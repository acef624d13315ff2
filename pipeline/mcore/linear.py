"""Linears over the tensor-parallel group, from megatron, and the two-layer networks made of them.

In: activations [seq/tp, batch, K] (sequence parallel where tp > 1). Out: column-parallel linears
give all positions and this rank's part of the columns; row-parallel ones take that and give back
[seq/tp, batch, N].
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.mcore.kernels.activation import relu_squared_
from pipeline.mcore.tap import Probe


def column_parallel(
    inputs: int, outputs: int, config: TransformerConfig, tp_group: Any, *, bias: bool
) -> nn.Module:
    """Megatron's column-parallel linear; returns (output, None) when called."""
    linear: nn.Module = ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=bias,
        gather_output=False,
        tp_group=tp_group,
    )
    return linear


def row_parallel(
    inputs: int, outputs: int, config: TransformerConfig, tp_group: Any, *, bias: bool
) -> nn.Module:
    """Megatron's row-parallel linear; adds its bias once, after the reduction."""
    linear: nn.Module = RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.output_layer_init_method,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tp_group,
    )
    return linear


class FeedForward(nn.Module):
    """`down_proj(relu(up_proj(x))**2)`: MLP layers and shared experts.

    Megatron's MLP and SharedExpertMLP would do, but the latter asserts against biases. Reports
    the input of `down_proj` only: that of `up_proj` is the norm's output, which the slot reports.
    """

    def __init__(
        self,
        width: int,
        *,
        bias: bool,
        probe: Probe,
        prefix: str = "",
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        hidden, tp_group = config.hidden_size, pg_collection.tp
        self.up_proj = column_parallel(hidden, width, config, tp_group, bias=bias)
        self.down_proj = row_parallel(width, hidden, config, tp_group, bias=bias)
        self.probe, self.prefix = probe, prefix

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same."""
        down_proj = f"{self.prefix}down_proj"
        up, _ = self.up_proj(self.probe.quantize(f"{self.prefix}up_proj", hidden))
        inner = relu_squared_(up, self.probe.amax_of(down_proj))
        output: torch.Tensor = self.down_proj(self.probe.quantize(down_proj, inner))[0]
        return output
