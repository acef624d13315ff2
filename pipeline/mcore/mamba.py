"""Megatron's Mamba-2 mixer with this model's biases, norm epsilon and kernel width.

In: [seq/tp, batch, hidden]. Out: the same.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.architecture import Architecture
from pipeline.errors import ConfigError
from pipeline.mcore.tap import Probe


class Mamba(nn.Module):
    """Megatron's MambaMixer, which asserts that in_proj and out_proj have no bias: ours may."""

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        probe: Probe,
    ) -> None:
        super().__init__()
        if not mamba_mixer.HAVE_MAMBA_SSM:
            raise ConfigError(
                "the Python package mamba_ssm",
                value="not installed",
                rule="Mamba layers on a GPU run its kernels",
                remedy="install mamba-ssm and causal-conv1d, or run with device=cpu",
            )
        a = architecture
        bias = {"has_bias": a.use_bias}
        self.mixer = MambaMixer(
            config,
            MambaMixerSubmodules(
                in_proj=ModuleSpec(module=_InProjection, params=bias),
                out_proj=ModuleSpec(module=_OutProjection, params=bias),
            ),
            d_model=a.hidden_size,
            d_conv=a.conv_kernel,
            chunk_size=a.chunk_size,
            layer_number=1,
            pg_collection=pg_collection,
        )
        self.mixer.norm.eps = a.layer_norm_epsilon  # the mixer hard-codes 1e-5
        probe.watch_input(self.mixer.in_proj, "in_proj")
        probe.watch_input(self.mixer.out_proj, "out_proj")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same."""
        output: torch.Tensor = self.mixer(hidden)[0]
        return output


class _InProjection(ColumnParallelLinear):
    """Takes its bias from `has_bias` instead of the mixer's constant False."""

    def __init__(self, *args: Any, has_bias: bool, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=has_bias, **kwargs)


class _OutProjection(RowParallelLinear):
    """The same; adds its bias itself."""

    def __init__(
        self, *args: Any, has_bias: bool, bias: bool, skip_bias_add: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, bias=has_bias, skip_bias_add=False, **kwargs)
