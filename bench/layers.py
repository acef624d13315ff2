"""Milliseconds of each kind of layer: norm, taps and residual included, as the sweep runs them.

    python -m bench.layers [--model nemotron3_ultra] [--batches 4,8] [--seconds 3] [--json PATH]

One slot of each kind is filled with synthetic weights and run for some seconds, so that clocks and
power have settled.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.full_model import flops_per_token
from launch.entry import CONF_DIR
from pipeline.architecture import Architecture, LayerType, layer_tensors
from pipeline.calibration.observers import LayerObserver
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES
from pipeline.checkpoint.synthetic import SyntheticSource
from pipeline.job import build_job, estimate_stored
from pipeline.mcore import backend
from pipeline.mcore.slots import Slot, build_slots
from pipeline.model_config import read_model_config
from pipeline.recipe import load_recipe
from pipeline.schedule import LayerSchedule
from pipeline.sharding import ParallelDims, shard_of


def main() -> None:
    """Builds, fills, measures, prints."""
    options = _options()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    values = read_model_config(options.model, CONF_DIR)
    architecture = Architecture.from_hf_config(values)
    dims = ParallelDims()
    stored = estimate_stored(architecture)
    source = SyntheticSource(options.model, values, stored, seed=0, device=device)
    recipe = load_recipe(options.recipe, CONF_DIR / "recipe")
    job = build_job(architecture, dims, recipe, stored)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    groups = backend.start(dims, 0, device)
    slots = build_slots(
        architecture, dims, 0, groups, device=device, compute_dtype=dtype, seq_len=options.seq_len
    )
    rows = []
    for kind, slot in slots.items():
        schedule = job.schedules[architecture.layers_of(kind)[0]]
        fill(slot, schedule.layer, source, architecture, dims)
        for batch in options.batches:
            rows.append(measure(slot, schedule, architecture, batch, options, device, dtype))
    backend.stop()
    _show(rows, options, device)


def fill(
    slot: Slot, layer: int, source: SyntheticSource, a: Architecture, dims: ParallelDims
) -> None:
    """Makes one layer's weights in its slot."""
    with torch.inference_mode():
        slot.begin_fill(layer)
        for spec in layer_tensors(a, layer):
            shard = shard_of(spec, a, dims, 0)
            assert shard is not None
            target = slot.target_of(spec, TORCH_DTYPES[source.info(spec.name).dtype])
            source.fill(spec.name, shard, target)
            slot.load(spec, shard, target)
        slot.end_fill()


@torch.inference_mode()
def measure(
    slot: Slot,
    schedule: LayerSchedule,
    a: Architecture,
    batch: int,
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """One kind of layer at one micro-batch."""
    kind, tokens = schedule.layer_type, batch * options.seq_len
    experts = a.n_routed_experts if kind is LayerType.moe else 0
    observer = LayerObserver(schedule.observed, experts, device)
    observer.begin_batch(torch.ones(batch, device=device), options.seq_len)
    start = torch.randn(options.seq_len, batch, a.hidden_size, device=device, dtype=dtype)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    ms = _time(lambda: slot.forward(start.clone(), observer), options.seconds, device)
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    copy_ms = _time(lambda: start.clone(), 0.2, device)
    flops = flops_per_token(a, kind, options.seq_len) * tokens
    return {
        "kind": kind.value,
        "micro_batch": batch,
        "tokens": tokens,
        "ms": ms - copy_ms,
        "tflops": flops / (ms - copy_ms) / 1e9,
        "bytes_per_token": peak / tokens - 2 * a.hidden_size if peak else 0.0,
    }


def _time(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Milliseconds of a call, repeated for some seconds after two to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds or not done:
        for _ in range(5):
            call()
        wait()
        done += 5
    return (time.monotonic() - start) / done * 1e3


def _show(rows: list[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> None:
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    table = Table(title=f"{options.model}, sequences of {options.seq_len}, on {where}")
    for column in ("kind", "micro-batch", "ms", "TFLOP/s of its products", "bytes per token"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in rows:
        table.add_row(
            row["kind"],
            str(row["micro_batch"]),
            f"{row['ms']:.2f}",
            f"{row['tflops']:.0f}",
            f"{row['bytes_per_token']:,.0f}",
        )
    Console().print(table)
    if options.json:
        result = {
            "command": "python -m bench.layers " + shlex.join(sys.argv[1:]),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": where,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "layers": rows,
        }
        Path(options.json).write_text(json.dumps(result, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="nemotron3_ultra", help="conf/model name or config.json")
    parser.add_argument("--recipe", default="nvfp4_four_over_six", help="decides what is observed")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[4, 8]
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--json", help="where to store the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
