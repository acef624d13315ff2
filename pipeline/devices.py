"""Where a rank computes, and in which dtype.

In: what the user asked for. Out: a device of its own for each rank, and the compute dtype.
"""

from __future__ import annotations

import torch

from pipeline.config import ComputeDtype, Device
from pipeline.errors import ConfigError


def choose_device(wish: Device, local_rank: int) -> torch.device:
    """The CPU, or this rank's GPU.

    Raises:
        ConfigError: There are fewer GPUs than ranks on this node.
    """
    if wish is Device.cpu or (wish is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            "device",
            value=f"{torch.cuda.device_count()} GPUs for local rank {local_rank}",
            rule="every rank needs a GPU of its own",
            remedy="start fewer ranks on this node, or use device=cpu",
        )
    return torch.device("cuda", local_rank)


def choose_dtype(wish: ComputeDtype, device: torch.device) -> torch.dtype:
    """float32 on a CPU and bfloat16 on a GPU, unless the user says otherwise."""
    if wish is ComputeDtype.auto:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if wish is ComputeDtype.float32 else torch.bfloat16
