"""Whole jobs on a chosen device, each in processes of its own.

    output = run_device_job(tmp_path / "out", Device.cuda, ComputeDtype.float32, world=2, ep=2)

Rank functions are importable and take plain values, because ranks are spawned once the caller has
initialised CUDA.
"""

import os
import struct
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.config import ComputeDtype, Device
from tests.distributed.helpers import free_port, run_ranks
from tests.e2e.harness import golden_config, is_activation_scalar

TIMEOUT_S = 240.0


def run_device_job(
    output: Path, device: Device, dtype: ComputeDtype, *, world: int = 1, **options: Any
) -> Path:
    """Runs the golden model's job on `world` ranks of `device`; returns the directory it made."""
    port = free_port()
    run_ranks(_job, world, output, device, dtype, port, options, timeout=TIMEOUT_S)
    return output


def _job(
    rank: int,
    output: Path,
    device: Device,
    dtype: ComputeDtype,
    port: int,
    options: dict[str, Any],
) -> None:
    world = dist.get_world_size()
    if device is Device.cuda:
        dist.destroy_process_group()  # gloo only: the job starts one with NCCL
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config = golden_config(output, device=device, compute_dtype=dtype, **options)
    calibrate(config, CONF_DIR, Place(rank, world, rank), "")


def activation_scalars(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> dict[str, float]:
    """input_scale, k_scale and v_scale by name."""
    return {
        name: struct.unpack("<f", data)[0]
        for name, (_, _, data) in tensors.items()
        if is_activation_scalar(name)
    }


def deviations(ours: dict[str, float], expected: dict[str, float]) -> list[float]:
    """Relative deviations, in ascending order; the names must agree."""
    assert set(ours) == set(expected)
    assert ours
    return sorted(abs(ours[name] / expected[name] - 1.0) for name in ours)
