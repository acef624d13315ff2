"""The two RMS norms of a Nemotron-H model, computed in fp32.

In: activations in any float dtype. Out: the same shape and dtype. Both work on the last dim of
whatever tokens this rank holds, so sequence parallelism needs nothing from them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same shape and dtype."""
        return (normalize(x.float(), self.eps) * self.weight.float()).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """Mamba's norm: gates with silu(z) first, then normalizes each group of channels.

    Takes the arguments that Megatron's MambaMixer passes to mamba_ssm's kernel of the same meaning.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "Nemotron-H gates before it normalizes"
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """`x` and its gate `z`, both [..., channels], to the shape and dtype of `x`."""
        gated = x.float() * F.silu(z.float())
        groups = gated.unflatten(-1, (-1, self.group_size))
        return (normalize(groups, self.eps).flatten(-2) * self.weight.float()).to(x.dtype)


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x**2) + eps)` over the last dim; `x` is fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
