"""Mamba-2 over the tensor-parallel group: megatron's parameters and projections, our own forward.

In: [seq/tp, batch, hidden]. Out: the same. Megatron's forward copies the activations from one
layout to another between its steps, at twice the cost of the steps themselves; here every step
reads and writes where the next one wants it:

    in_proj -> [z, x, B, C, dt] -> convolution of [x, B, C] -> scan -> gated norm with z -> out_proj

Dims: l sequence, b batch, d channels, h head, p head dim, g group, n state.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.kernels.convolution import convolve
from pipeline.mcore.kernels.scan import scan
from pipeline.mcore.ssd import scan_in_torch
from pipeline.mcore.tap import Probe

# The scan takes so many elements of x at a time: enough to fill a GPU, few enough that what only it
# needs (about three times as much memory as x) is small beside what in_proj gives.
_SCAN_ELEMENTS = 2**27


class Mamba(nn.Module):
    """Megatron's MambaMixer with biases of in_proj and out_proj, which that one asserts away."""

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        probe: Probe,
    ) -> None:
        super().__init__()
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
        self.probe = probe
        tp, state = pg_collection.tp.size(), a.n_groups * a.ssm_state_size
        self.channels = a.mamba_intermediate_size // tp
        self.conv_rows = (self.channels, state // tp, state // tp)
        self.rows = (self.channels, sum(self.conv_rows), a.mamba_num_heads // tp)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same; batch entries are separate sequences."""
        output: torch.Tensor = self.mixer.out_proj(self._mix(self.mixer.in_proj(hidden)[0]))[0]
        return output

    def _mix(self, projected_lbd: torch.Tensor) -> torch.Tensor:
        """From what in_proj gives, [seq, batch, z x B C dt], to what out_proj takes."""
        mixer, amax = self.mixer, self.probe.amax_of("out_proj")
        length, batch, _ = projected_lbd.shape
        z_bld, xBC_bld, dt_blh = projected_lbd.transpose(0, 1).split(self.rows, dim=-1)
        mixed_lbd = projected_lbd.new_empty(length, batch, self.channels)
        mixed_bld = mixed_lbd.transpose(0, 1)
        sequences = max(_SCAN_ELEMENTS // (length * self.channels), 1)
        for start in range(0, batch, sequences):
            part = slice(start, start + sequences)
            y_blhp = self._scan(
                convolve(xBC_bld[part], mixer.conv1d_weight.squeeze(1), mixer.conv1d_bias),
                dt_blh[part].contiguous(),
            )
            mixer.norm(y_blhp.flatten(2), z_bld[part], out_bld=mixed_bld[part], amax=amax)
            del y_blhp  # before the next part needs as much
        return mixed_lbd

    def _scan(self, xBC_bld: torch.Tensor, dt_blh: torch.Tensor) -> torch.Tensor:
        """[batch, seq, x B C] and the time steps before bias and softplus, to [b, l, h, p]."""
        mixer = self.mixer
        x_bld, B_bld, C_bld = xBC_bld.split(self.conv_rows, dim=-1)
        x_blhp = x_bld.unflatten(-1, (-1, mixer.headdim))
        B_blgn, C_blgn = (part.unflatten(-1, (-1, mixer.d_state)) for part in (B_bld, C_bld))
        rate_h = -torch.exp(mixer.A_log.float())
        inputs = (x_blhp, dt_blh, rate_h, B_blgn, C_blgn, mixer.D, mixer.dt_bias)
        if x_blhp.is_cuda and x_blhp.dtype is not torch.float32:
            return scan(*inputs)
        return scan_in_torch(*inputs, mixer.chunk_size)


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
