"""Progress of the sweep: rank 0 says where it is, how fast, how much memory, how long still."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from typing import Any

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
        layers: Number of layers of the model; the attribute is lowered where some are not visited.
        tokens: Calibration tokens that pass through every layer (all ranks). The speed is that of
            tokens through the whole model.
        device: Device whose peak memory is told.
        interval_s: Least seconds between two lines.
        enabled: False on ranks other than 0.
        record: Takes the figures of every layer, spoken or not (metrics.jsonl); None drops them.

    Attributes:
        figures: Of the last layer, where enabled: its speed, what is left, and the peak memory.
    """

    def __init__(
        self,
        layers: int,
        tokens: int,
        device: torch.device,
        *,
        interval_s: float,
        enabled: bool,
        record: Callable[..., None] | None = None,
    ) -> None:
        self.layers, self.tokens, self.device = layers, tokens, device
        self._of_model = layers
        self.interval_s, self.enabled, self.record = interval_s, enabled, record
        self.started = time.monotonic()
        self.spoken = -interval_s
        self.done = 0
        self.figures: dict[str, float] = {}

    def layer_done(
        self, layer: int, kind: str, *, phase: str, experts: str = "", **figures: Any
    ) -> None:
        """Counts a layer, records its figures, and says so if it is time."""
        self.done += 1
        if not self.enabled:
            return
        elapsed = time.monotonic() - self.started
        left = elapsed / self.done * (self.layers - self.done)
        speed = self.tokens * self.done / max(elapsed, 1e-9) / self._of_model
        peak = peak_memory_gib(self.device)
        self.figures = {"tokens_per_s": speed, "left_s": left, "peak_gib": peak}
        if self.record is not None:
            self.record(
                phase=phase,
                layer=layer,
                type=str(kind),
                done=self.done,
                layers=self.layers,
                **self.figures,
                **figures,
            )
        if elapsed - self.spoken < self.interval_s and self.done < self.layers:
            return
        self.spoken = elapsed
        logger.info(
            "%s: layer %d (%s), %d/%d, %speak %.2f GiB%s, %s left",
            phase,
            layer,
            kind,
            self.done,
            self.layers,
            f"{speed:,.0f} tok/s, " if self.tokens else "",
            peak,
            experts,
            _clock(left),
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
