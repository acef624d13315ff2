"""What makes megatron-core 0.19 exact and repeatable on a GPU, installed and removed by calls.

In: nothing. Out: attributes of third-party modules replaced, each with the reason beside it.
Installing twice is harmless; `remove` puts the originals back.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from megatron.core.ssm import mamba_mixer

from pipeline.mcore import ssd

# The kernels of mamba_ssm's forward scan, by module below mamba_ssm.ops.triton, with the tiles that
# each is to use: what the kernels' own timing chose on an H100 at the width of Nemotron 3 Ultra.
_SCAN_KERNELS: dict[str, dict[str, dict[str, int]]] = {
    "ssd_bmm": {
        "_bmm_chunk_fwd_kernel": {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32}
    },
    "ssd_chunk_scan": {
        "_chunk_scan_fwd_kernel": {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32}
    },
    "ssd_chunk_state": {
        "_chunk_cumsum_fwd_kernel": {"BLOCK_SIZE_H": 16},
        "_chunk_state_fwd_kernel": {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32},
    },
    "ssd_state_passing": {"_state_passing_fwd_kernel": {"BLOCK_SIZE": 2048}},
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
        # another order. With one choice left they have nothing to time, and no other bits.
        *((tuner, "configs", [config]) for tuner, config in _pinned_kernels()),
    ]


def _pinned_kernels() -> list[tuple[Any, Any]]:
    """Each kernel's autotuner, and the entry of its list that it is to use."""
    if not mamba_mixer.HAVE_MAMBA_SSM:
        return []
    pinned = []
    for module, kernels in _SCAN_KERNELS.items():
        owner = importlib.import_module(f"mamba_ssm.ops.triton.{module}")
        for name, tiles in kernels.items():
            tuner = getattr(owner, name)
            matching = [config for config in tuner.configs if config.kwargs == tiles]
            # A release of mamba_ssm without these tiles: its smallest fit every GPU.
            config = min(matching or tuner.configs, key=lambda c: math.prod(c.kwargs.values()))
            pinned.append((tuner, config))
    return pinned
