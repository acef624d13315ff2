"""Runs whole jobs in tests: on real gloo ranks, on the golden model or a made one.

output = run_job(tmp_path / "out", world=2, ep=2, recipe="nvfp4_four_over_six")
tensors = read_checkpoint(output)
"""

import json
from pathlib import Path
from typing import Any

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.config import (
    CalibrateConfig,
    CalibrationConfig,
    Device,
    EvaluationConfig,
    ParallelConfig,
)
from pipeline.mcore import slots  # noqa: F401  (imported before forking: once, not per rank)
from pipeline.recipe import load_recipe
from tests.distributed.helpers import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "modelopt_tiny"
GOLDEN_SIZE = {"num_sequences": 8, "seq_len": 96, "loss_sequences": 2}


def golden_config(output: Path, **options: Any) -> CalibrateConfig:
    """The golden model on its own calibration ids; `options` override anything."""
    parallel = {name: options.pop(name) for name in ("tp", "ep", "etp") if name in options}
    size = {**GOLDEN_SIZE, **options.pop("calibration", {})}
    values: dict[str, Any] = {
        "checkpoint": str(GOLDEN / "source"),
        "output": str(output),
        "recipe": "nvfp4_four_over_six",
        "data": str(GOLDEN / "calibration_ids.npy"),
        "calibration": CalibrationConfig(**size),
        "parallel": ParallelConfig(**parallel),
        "evaluation": EvaluationConfig(**{"num_sequences": 0, **options.pop("evaluation", {})}),
        "allow_bad_loss": True,  # the golden model is random
        "timeout_minutes": 1,
        "device": Device.cpu,
    }
    return CalibrateConfig(**{**values, **options})


def run_job(output: Path, *, world: int = 1, timeout: float = 120.0, **options: Any) -> Path:
    """Runs one job on `world` forked ranks; returns the directory it made."""
    config = golden_config(output, **options)
    load_recipe(config.recipe, CONF_DIR / "recipe")  # imports Model Optimizer before forking

    def job(rank: int) -> None:
        calibrate(config, CONF_DIR, Place(rank, world, rank), "")

    run_ranks(job, world, timeout=timeout)
    return output


def read_checkpoint(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory by name: dtype, shape and bytes."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert name not in found, f"{name} is in two files"
            start, stop = entry["data_offsets"]
            value = data[8 + length + start : 8 + length + stop]
            found[name] = (entry["dtype"], tuple(entry["shape"]), value)
    return found


def is_activation_scalar(name: str) -> bool:
    """Whether a tensor comes from activations, and so may differ a little between layouts."""
    return name.endswith((".input_scale", ".k_scale", ".v_scale"))
