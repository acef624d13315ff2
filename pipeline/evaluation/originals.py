"""A layer's BF16 weights, kept on the host while a slot holds quantized ones.

In: a slot and what is going to be quantized in it. Out: the slot as it was, as often as wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.runtime.pinned import host_memory
from pipeline.schedule import EXPERT_PROJECTIONS, LayerSchedule
from pipeline.weights import LayerSlot


class Originals:
    """Host memory for one layer's weights at a time; page-locked beside a GPU.

    Args:
        device: Where the slots are.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, slot: LayerSlot, schedules: Sequence[LayerSchedule]) -> None:
        """Copies every weight that one of these schedules quantizes."""
        dense = {item.spec.name for schedule in schedules for item in schedule.dense}
        weights = [slot.weight(name) for name in sorted(dense)]
        weights += [
            slot.experts(projection)[0]
            for projection in EXPERT_PROJECTIONS
            if any(projection in schedule.experts for schedule in schedules)
        ]
        needed = sum(weight.nbytes for weight in weights)
        if needed > self._memory.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # before the larger one is taken
            self._memory = host_memory(needed, pinned=self._pinned)
        self._kept, start = [], 0
        for weight in weights:
            part = self._memory[start : start + weight.nbytes]
            start += weight.nbytes
            copy = part.view(weight.dtype).view(weight.shape)
            copy.copy_(weight, non_blocking=True)
            self._kept.append((weight, copy))

    def restore(self) -> None:
        """Puts the weights back, in the order of the current stream."""
        with torch.inference_mode():
            for weight, copy in self._kept:
                weight.copy_(copy, non_blocking=True)
