"""Progress of the sweep: rank 0 says where it is, how fast, how much memory, how long still."""

from __future__ import annotations

import logging
import resource
import time

import torch

logger = logging.getLogger(__name__)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the device, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Progress:
    """Prints at most one line per interval; the last layer always speaks.

    Args:
        layers: Number of layers in the sweep.
        tokens: Calibration tokens that pass through every layer (all ranks).
        device: Device whose peak memory is told.
        interval_s: Least seconds between two lines.
        enabled: False on ranks other than 0.
    """

    def __init__(
        self, layers: int, tokens: int, device: torch.device, *, interval_s: float, enabled: bool
    ) -> None:
        self.layers, self.tokens, self.device = layers, tokens, device
        self.interval_s, self.enabled = interval_s, enabled
        self.started = time.monotonic()
        self.spoken = -interval_s
        self.done = 0

    def layer_done(self, layer: int, kind: str, *, phase: str, experts: str = "") -> None:
        """Counts a layer and says so, if it is time."""
        self.done += 1
        elapsed = time.monotonic() - self.started
        last = self.done == self.layers
        if not self.enabled or (elapsed - self.spoken < self.interval_s and not last):
            return
        self.spoken = elapsed
        left = elapsed / self.done * (self.layers - self.done)
        speed = (
            f"{self.tokens * self.done / elapsed / self.layers:,.0f} tok/s, " if self.tokens else ""
        )
        logger.info(
            "%s: layer %d (%s), %d/%d, %speak %.2f GiB%s, %s left",
            phase,
            layer,
            kind,
            self.done,
            self.layers,
            speed,
            peak_memory_gib(self.device),
            experts,
            _clock(left),
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
