"""Inputs as a server's kernels read them.

In: a layer's input scales and the serving mode. Out: a quantizer for `Slot.forward`, which also
counts what lies beyond the calibrated range.
"""

from __future__ import annotations

import torch

from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.scales import LayerScales
from pipeline.nvfp4.activations import count_beyond, fp8_input, nvfp4_input
from pipeline.nvfp4.formats import Format


class InputQuantizer:
    """Quantizes and dequantizes the inputs of one layer.

    Args:
        scales: By tap name; others pass as they are.
        mode: Of serving; under w4a16 NVFP4 layers read 16-bit inputs.
        device: Where the layer runs.
        backend: Name of what quantizes.
        counts: Running sums to be raised: elements quantized and elements beyond the calibrated
            amax, fp64 [2] on the device; None does not count.
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
        taps: frozenset[str] | None = None,
    ) -> None:
        self._backend, self._counts = backend, counts
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
            self._counts[0] += x.numel()
            self._counts[1] += count_beyond(x, amax, self._backend)
        if input_format is Format.nvfp4:
            return nvfp4_input(x, scale, self._backend)
        return fp8_input(x, scale, self._backend)
