"""What makes megatron-core 0.19 exact on a GPU, installed and removed by calls.

In: nothing. Out: attributes of third-party modules replaced, each with the reason beside it.
Installing twice is harmless; `remove` puts the originals back.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.ssm import mamba_mixer

from pipeline.mcore.norms import GatedRMSNorm


def install() -> None:
    """Makes fp32 mean fp32, and lets Mamba layers be built without mamba_ssm."""
    if _is_installed():
        return

    class Norm(GatedRMSNorm):
        """Stands in for the mixer's norm; keeps what was replaced (no state of our own)."""

    replacements: list[tuple[Any, str, Any]] = [
        # The mixer refuses to be built without mamba_ssm, which our forward has no use for.
        (mamba_mixer, "HAVE_MAMBA_SSM", True),
        (mamba_mixer, "ExtendedRMSNorm", Norm),
        # torch lets cuDNN and, where asked, cuBLAS round fp32 to the 10 bits of TF32.
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
    ]
    Norm.originals = [  # type: ignore[attr-defined]
        (owner, name, getattr(owner, name)) for owner, name, _ in replacements
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)


def remove() -> None:
    """Puts back what `install` replaced; nothing to do where it was not called."""
    if not _is_installed():
        return
    for owner, name, original in mamba_mixer.ExtendedRMSNorm.originals:
        setattr(owner, name, original)


def _is_installed() -> bool:
    return "originals" in vars(mamba_mixer.ExtendedRMSNorm)
