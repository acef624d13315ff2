"""Inputs as a server's kernels read them.

In: a layer's input scales and the serving mode. Out: a quantizer for `Slot.forward`, which also
counts, by tap, what lies beyond the calibrated range, and how much of the range is reached.
"""

from __future__ import annotations

import math

import torch

from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.scales import LayerScales
from pipeline.nvfp4.activations import count_beyond, fp8_input, nvfp4_input
from pipeline.nvfp4.formats import Format

TAPS = (
    *("in_proj", "out_proj"),
    *("qkv", "o_proj", "k_cache", "v_cache"),
    *("fc1_latent_proj", "fc2_latent_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
    *("experts.up_proj", "experts.down_proj"),
    *("up_proj", "down_proj"),
)
"""Every input that a layer may quantize (`pipeline.mcore.tap`)."""


class InputQuantizer:
    """Quantizes and dequantizes the inputs of one layer.

    Args:
        scales: By tap name; others pass as they are.
        mode: Of serving; under w4a16 NVFP4 layers read 16-bit inputs.
        device: Where the layer runs.
        backend: Name of what quantizes.
        counts: Running sums to be raised, by tap: elements quantized and elements beyond the
            calibrated amax, fp64 [taps, 2] on the device; None does not count.
        reach: Running maxima to be raised, by tap: largest absolute value over the calibrated amax,
            fp32 [taps] on the device; None does not look.
        taps: Only these; None: all.
    """

    def __init__(
        self,
        scales: LayerScales,
        mode: ServingMode,
        device: torch.device,
        backend: str,
        *,
        counts: torch.Tensor | None = None,
        reach: torch.Tensor | None = None,
        taps: frozenset[str] | None = None,
    ) -> None:
        self._backend, self._counts, self._reach = backend, counts, reach
        self._scales = {
            tap: (item.format, *torch.tensor([item.scale, item.amax], device=device))
            for tap, item in scales.items()
            if (taps is None or tap in taps)
            and not (mode is ServingMode.w4a16 and item.format is Format.nvfp4)
        }

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        """What the server's product reads in the place of `x` [..., K], which is not changed."""
        if projection not in self._scales:
            return x
        input_format, scale, amax = self._scales[projection]
        if self._counts is not None:
            counts = self._counts[TAPS.index(projection)]
            counts[0] += x.numel()
            counts[1] += count_beyond(x, amax, self._backend)
        if self._reach is not None and x.numel():
            held = self._reach[TAPS.index(projection)]
            largest = torch.linalg.vector_norm(x, math.inf).float()
            held.copy_(torch.maximum(held, largest / amax))
        if input_format is Format.nvfp4:
            return nvfp4_input(x, scale, self._backend)
        return fp8_input(x, scale, self._backend)
