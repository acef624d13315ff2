"""What megatron-core 0.19 needs to run on CPU with gloo, installed and removed by explicit calls.

In: nothing. Out: one function of torch replaced, with the reason beside it. Installing twice is
harmless; `remove` puts the original back.
"""

from __future__ import annotations

import torch


def install() -> None:
    """Makes megatron allocate parameters and communication buffers on the CPU."""
    if _is_installed():
        return

    def current_device() -> str:
        return "cpu"

    # What was replaced lives on the stand-in itself: no state of our own.
    current_device.original = torch.cuda.current_device  # type: ignore[attr-defined]
    torch.cuda.current_device = current_device  # type: ignore[assignment]


def remove() -> None:
    """Puts back what `install` replaced; nothing to do where it was not called."""
    if _is_installed():
        torch.cuda.current_device = torch.cuda.current_device.original  # type: ignore[attr-defined]


def _is_installed() -> bool:
    return hasattr(torch.cuda.current_device, "original")
