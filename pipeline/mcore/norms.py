"""The two RMS norms of a Nemotron-H model, computed in fp32.

In: activations in any float dtype. Out: the same shape and dtype, and on request the largest
output. Both work on the last dim of whatever tokens this rank holds, so sequence parallelism needs
nothing from them. What they mean stands here in plain torch; on a GPU each is one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.mcore.kernels.activation import raise_amax
from pipeline.mcore.kernels.norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """The norm before every mixer; weight [hidden_size].

    Megatron's `WrappedTorchNorm` would do, but asserts against sequence parallelism.
    """

    def __init__(
        self, hidden_size: int, eps: float, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, amax: torch.Tensor | None = None) -> torch.Tensor:
        """[..., hidden] to the same shape and dtype; raises `amax`, fp32 [1], by the output."""
        if x.is_cuda:
            return rms_norm(x, self.weight, self.eps, amax)
        out = (normalize(x.float(), self.eps) * self.weight.float()).to(x.dtype)
        if amax is not None:
            raise_amax(out, amax)
        return out


class GatedRMSNorm(nn.Module):
    """Mamba's norm: gates with silu(z) first, then normalizes each group of channels."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        group_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))

    def forward(
        self,
        x_bld: torch.Tensor,
        z_bld: torch.Tensor,
        *,
        out_bld: torch.Tensor | None = None,
        amax: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x` and its gate `z` to the shape and dtype of `x`.

        Args:
            x_bld: [batch, seq, channels]; only the last dim need be contiguous, here and below.
            z_bld: The same shape.
            out_bld: Where the result goes; a new tensor where None.
            amax: Running amax of the output, fp32 [1], to be raised.
        """
        if out_bld is None:
            out_bld = torch.empty(x_bld.shape, dtype=x_bld.dtype, device=x_bld.device)
        if x_bld.is_cuda:
            gated_rms_norm(
                x_bld,
                z_bld,
                self.weight,
                self.eps,
                self.group_size,
                out_bld=out_bld,
                amax=amax,
            )
            return out_bld
        gated = x_bld.float() * F.silu(z_bld.float())
        groups = gated.unflatten(-1, (-1, self.group_size))
        out_bld.copy_(normalize(groups, self.eps).flatten(-2) * self.weight.float())
        if amax is not None:
            raise_amax(out_bld, amax)
        return out_bld


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x**2) + eps)` over the last dim; `x` is fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
