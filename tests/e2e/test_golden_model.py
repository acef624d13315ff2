"""The golden model through the whole job, against what Model Optimizer made of it on a GPU."""

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.harness import GOLDEN, is_activation_scalar, read_checkpoint, run_job

RECIPES = {
    "four_over_six": "models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6",
    "nvfp4_default-kv_fp8": "general/ptq/nvfp4_default-kv_fp8",
}
# Blocks where Model Optimizer's search tries one neighbour of a rounding tie and its export
# writes the other: 22 blocks in 4 tensors (tests/unit/nvfp4 shows that ours err less there).
TIES = {"four_over_six": (22, 4), "nvfp4_default-kv_fp8": (0, 0)}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_equals_model_optimizers_export(name: str, tmp_path: Path) -> None:
    ours = read_checkpoint(run_job(tmp_path / "out", recipe=RECIPES[name], clamp_kv_scales=False))
    theirs = read_checkpoint(GOLDEN / name)
    source = read_checkpoint(GOLDEN / "source")
    assert set(ours) == set(theirs)
    tied_blocks = 0
    tied_tensors = set()
    for tensor, (dtype, shape, data) in ours.items():
        if tensor in source and data == source[tensor][2]:
            continue  # theirs were exported from an fp32 model: same values, other dtype
        assert (dtype, shape) == theirs[tensor][:2], tensor
        if is_activation_scalar(tensor):
            (a,), (b,) = struct.unpack("<f", data), struct.unpack("<f", theirs[tensor][2])
            assert a == pytest.approx(b, rel=1e-3), tensor
        elif data != theirs[tensor][2]:
            assert tensor.endswith((".weight", ".weight_scale")), tensor
            if tensor.endswith(".weight_scale"):
                a8 = np.frombuffer(data, np.uint8)
                b8 = np.frombuffer(theirs[tensor][2], np.uint8)
                tied_blocks += int((a8 != b8).sum())
                tied_tensors.add(tensor)
    assert (tied_blocks, len(tied_tensors)) == TIES[name]
