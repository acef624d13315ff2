"""Mamba-2 over the tensor-parallel group, on megatron's parallel linears.

In: [seq/tp, batch, hidden]. Out: the same. Megatron's own mixer copies the activations from one
layout to another between its steps, at twice the cost of the steps themselves; here every step
reads and writes where the next one wants it:

    in_proj -> [z, x, B, C, dt] -> convolution of [x, B, C] -> scan -> gated norm with z -> out_proj

Dims: l sequence, b batch, d channels, h head, p head dim, g group, n state.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.kernels.convolution import convolve
from pipeline.mcore.kernels.scan import scan
from pipeline.mcore.linear import column_parallel, row_parallel
from pipeline.mcore.norms import GatedRMSNorm
from pipeline.mcore.ssd import scan_in_torch
from pipeline.mcore.tap import Probe

# The scan takes so many elements of x at a time: enough to fill a GPU, few enough that what only it
# needs (about three times as much memory as x) is small beside what in_proj gives.
_SCAN_ELEMENTS = 2**27


class Mamba(nn.Module):
    """The projections, the convolution, the scan and the gated norm of one layer.

    Attributes:
        channels: Local width of z and of x.
        conv_rows: Local widths of x, B and C.
        rows: Local widths of z, of [x, B, C] and of dt: the parts of what in_proj gives.
    """

    conv1d_bias: torch.Tensor

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        probe: Probe,
        device: torch.device,
    ) -> None:
        super().__init__()
        a, tp_group, dtype = architecture, pg_collection.tp, config.params_dtype
        tp, state = tp_group.size(), a.n_groups * a.ssm_state_size
        heads, inner = a.mamba_num_heads // tp, a.mamba_intermediate_size
        self.head_dim, self.state_size = a.mamba_head_dim, a.ssm_state_size
        self.chunk_size = a.chunk_size
        self.probe = probe
        self.channels = inner // tp
        self.conv_rows = (self.channels, state // tp, state // tp)
        self.rows = (self.channels, sum(self.conv_rows), heads)
        self.in_proj = column_parallel(
            a.hidden_size, sum(self.rows) * tp, config, tp_group, bias=a.use_bias
        )
        self.out_proj = row_parallel(inner, a.hidden_size, config, tp_group, bias=a.use_bias)
        channels = sum(self.conv_rows)
        kernel = torch.empty(channels, 1, a.conv_kernel, device=device, dtype=dtype)
        self.conv1d_weight = nn.Parameter(kernel)
        if a.use_conv_bias:
            self.conv1d_bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_buffer("conv1d_bias", torch.zeros(channels, device=device, dtype=dtype))
        # These three take the dtype of the source once they are filled.
        self.A_log, self.D, self.dt_bias = (
            nn.Parameter(torch.empty(heads, device=device)) for _ in range(3)
        )
        self.norm = GatedRMSNorm(
            self.channels,
            a.layer_norm_epsilon,
            group_size=inner // a.n_groups,
            device=device,
            dtype=dtype,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same; batch entries are separate sequences."""
        mixed_lbd = self._mix(self.in_proj(self.probe.quantize("in_proj", hidden))[0])
        output: torch.Tensor = self.out_proj(self.probe.quantize("out_proj", mixed_lbd))[0]
        return output

    def _mix(self, projected_lbd: torch.Tensor) -> torch.Tensor:
        """From what in_proj gives, [seq, batch, z x B C dt], to what out_proj takes."""
        amax = self.probe.amax_of("out_proj")
        length, batch, _ = projected_lbd.shape
        z_bld, xBC_bld, dt_blh = projected_lbd.transpose(0, 1).split(self.rows, dim=-1)
        mixed_lbd = projected_lbd.new_empty(length, batch, self.channels)
        mixed_bld = mixed_lbd.transpose(0, 1)
        sequences = max(_SCAN_ELEMENTS // (length * self.channels), 1)
        for start in range(0, batch, sequences):
            part = slice(start, start + sequences)
            y_blhp = self._scan(
                convolve(xBC_bld[part], self.conv1d_weight.squeeze(1), self.conv1d_bias),
                dt_blh[part].contiguous(),
            )
            self.norm(y_blhp.flatten(2), z_bld[part], out_bld=mixed_bld[part], amax=amax)
            del y_blhp  # before the next part needs as much
        return mixed_lbd

    def _scan(self, xBC_bld: torch.Tensor, dt_blh: torch.Tensor) -> torch.Tensor:
        """[batch, seq, x B C] and the time steps before bias and softplus, to [b, l, h, p]."""
        x_bld, B_bld, C_bld = xBC_bld.split(self.conv_rows, dim=-1)
        x_blhp = x_bld.unflatten(-1, (-1, self.head_dim))
        B_blgn, C_blgn = (part.unflatten(-1, (-1, self.state_size)) for part in (B_bld, C_bld))
        rate_h = -torch.exp(self.A_log.float())
        inputs = (x_blhp, dt_blh, rate_h, B_blgn, C_blgn, self.D, self.dt_bias)
        if x_blhp.is_cuda and x_blhp.dtype is not torch.float32:
            return scan(*inputs)
        return scan_in_torch(*inputs, self.chunk_size)
