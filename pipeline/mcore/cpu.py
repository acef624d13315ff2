"""What megatron-core 0.19 needs to run on CPU with gloo, installed and removed by explicit calls.

In: nothing. Out: attributes of third-party modules replaced, each with the reason beside it.
Installing twice is harmless; `remove` puts the originals back.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.ssm import mamba_mixer

from pipeline.mcore.norms import GatedRMSNorm


def install() -> None:
    """Makes megatron allocate on the CPU, and build Mamba layers without mamba_ssm."""
    if _is_installed():
        return
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in _stand_ins()]
    for owner, name, stand_in in _stand_ins():
        setattr(owner, name, stand_in)
    # The record of what was replaced lives on the stand-in itself: no state of our own.
    torch.cuda.current_device.originals = originals  # type: ignore[attr-defined]


def remove() -> None:
    """Puts back what `install` replaced; nothing to do where it was not called."""
    if not _is_installed():
        return
    for owner, name, original in torch.cuda.current_device.originals:  # type: ignore[attr-defined]
        setattr(owner, name, original)


def _is_installed() -> bool:
    return hasattr(torch.cuda.current_device, "originals")


def _stand_ins() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement)."""

    def current_device() -> str:
        return "cpu"

    return [
        # Megatron allocates parameters and communication buffers on this device.
        (torch.cuda, "current_device", current_device),
        # The mixer refuses to be built without mamba_ssm, which our forward has no use for.
        (mamba_mixer, "HAVE_MAMBA_SSM", True),
        (mamba_mixer, "ExtendedRMSNorm", GatedRMSNorm),
    ]
