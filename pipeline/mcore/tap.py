"""How observers see what flows through a slot, and how a quantizer changes it.

In: a `Tap` and a `Quantizer` handed to `Slot.forward`. Out: the tap's methods are called with the
inputs of every projection that a recipe may quantize, with the cached keys and values, and with the
routing; the projections and the attention read what the quantizer makes of the same tensors.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Tap(Protocol):
    """Receives what a layer computes; must not change it."""

    def activation(self, projection: str, x: torch.Tensor) -> None:
        """Input [..., K] of a projection, or the keys or values as they would be cached.

        Names: in_proj, out_proj; qkv, o_proj, k_cache, v_cache; fc1_latent_proj, fc2_latent_proj,
        shared_experts.up_proj, shared_experts.down_proj, experts.up_proj, experts.down_proj;
        up_proj, down_proj.
        """

    def amax_of(self, projection: str) -> torch.Tensor | None:
        """The running amax of a projection's inputs, fp32 [1], for a kernel to raise in place.

        None where nobody asks for it. NaN must raise it to inf.
        """

    def routing(self, chosen_TK: torch.Tensor) -> None:
        """Experts of this rank's own tokens, int [tokens, top_k]; row = position * batch + b."""


class Quantizer(Protocol):
    """Stands for what a server does to the inputs of its products."""

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        """What the server's product reads instead of x [..., K]: a new tensor, or x itself.

        x is not to be changed: the router and other projections may read it too. Names are those
        of `Tap.activation`, each called once in a forward pass: `qkv` for the three projections,
        `experts.up_proj` with every token once, `experts.down_proj` with the rows of all local
        experts (there may be none). What is cut over ranks is this rank's part.
        """


class Probe:
    """The place where a slot's modules report and ask; nothing happens while neither is set."""

    def __init__(self) -> None:
        self.tap: Tap | None = None
        self.quantizer: Quantizer | None = None

    def activation(self, projection: str, x: torch.Tensor) -> None:
        """Passes `x` on to the tap."""
        if self.tap is not None:
            self.tap.activation(projection, x)

    def amax_of(self, projection: str) -> torch.Tensor | None:
        """The running amax that a kernel may raise instead of a call of `activation`."""
        return None if self.tap is None else self.tap.amax_of(projection)

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        """What the projection reads: `x` itself where there is no quantizer."""
        return x if self.quantizer is None else self.quantizer.quantize(projection, x)

    def routing(self, chosen_TK: torch.Tensor) -> None:
        """Passes the chosen experts on to the tap."""
        if self.tap is not None:
            self.tap.routing(chosen_TK)
