"""What makes megatron-core 0.19 exact and repeatable on a GPU, installed and removed by calls.

In: nothing. Out: attributes of third-party modules replaced, each with the reason beside it.
Installing twice is harmless; `remove` puts the originals back.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from megatron.core.ssm import mamba_mixer

from pipeline.mcore import ssd

# Kernels of mamba_ssm's forward scan, by module below mamba_ssm.ops.triton.
_SCAN_KERNELS = {
    "ssd_bmm": ("_bmm_chunk_fwd_kernel",),
    "ssd_chunk_scan": ("_chunk_scan_fwd_kernel",),
    "ssd_chunk_state": ("_chunk_cumsum_fwd_kernel", "_chunk_state_fwd_kernel"),
    "ssd_state_passing": ("_state_passing_fwd_kernel",),
}


def install() -> None:
    """Makes fp32 mean fp32, and gives mamba_ssm's scan the same bits in every run."""
    if _is_installed():
        return
    originals = []
    for owner, name, replacement in _replacements():
        originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)
    # The record of what was replaced lives on the replacement itself: no state of our own.
    mamba_mixer.mamba_chunk_scan_combined.originals = originals


def remove() -> None:
    """Puts back what `install` replaced; nothing to do where it was not called."""
    if not _is_installed():
        return
    for owner, name, original in mamba_mixer.mamba_chunk_scan_combined.originals:
        setattr(owner, name, original)


def _is_installed() -> bool:
    return hasattr(mamba_mixer.mamba_chunk_scan_combined, "originals")


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement)."""
    kernel = mamba_mixer.mamba_chunk_scan_combined

    def scan(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype is not torch.float32:
            return kernel(x, *args, **kwargs)
        kwargs.pop("state_dtype", None)  # ours keeps its states in fp32
        return ssd.mamba_chunk_scan_combined(x, *args, **kwargs)

    return [
        # The kernels multiply fp32 inputs in TF32 (Triton's default), with 10 bits of mantissa.
        (mamba_mixer, "mamba_chunk_scan_combined", scan),
        # torch lets cuDNN's convolutions do the same.
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
        # The kernels choose their tiles by timing them, in every process anew; other tiles add in
        # another order. One choice, the first on their list, gives the same bits every time.
        *((tuner, "configs", tuner.configs[:1]) for tuner in _autotuned_kernels()),
    ]


def _autotuned_kernels() -> list[Any]:
    if not mamba_mixer.HAVE_MAMBA_SSM:
        return []
    kernels: list[Any] = []
    for module, names in _SCAN_KERNELS.items():
        owner = importlib.import_module(f"mamba_ssm.ops.triton.{module}")
        kernels.extend(getattr(owner, name) for name in names)
    return kernels
