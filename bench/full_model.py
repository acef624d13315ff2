"""A whole model's sweep on this machine's GPUs: synthetic weights of any shape, output discarded.

    python -m bench.full_model --gpus 1 --json result.json
    python -m bench.full_model --gpus 2 parallel.ep=2 --json result.json

Runs `launch.calibrate checkpoint=synthetic output=discard` (with torchrun for more than one GPU),
then reads its metrics. First it measures what the card's matrix products reach, and what that makes
of the model's own products: the share of that ceiling is told for each kind of layer. The figures
are those of the sweep alone: nothing is read from a disk and nothing is written to one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launch.entry import CONF_DIR
from pipeline.architecture import Architecture, LayerType
from pipeline.model_config import read_model_config
from pipeline.report.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measures the ceiling, runs the sweep, prints and stores the figures."""
    options = _options()
    architecture = Architecture.from_hf_config(read_model_config(options.model, CONF_DIR))
    ceiling = matmul_ceiling()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report"
        command = _command(options, report)
        wall_s, used_gib = _run(command)
        metrics = read_metrics(report / "metrics.jsonl")
        run = json.loads((report / "run.json").read_text())
    tokens = options.sequences * options.seq_len
    result = {
        "command": "python -m bench.full_model " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{options.gpus} x {torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores",
        "versions": _versions(),
        "scope": "sweep only: synthetic weights, output discarded",
        "model": options.model,
        "recipe": options.recipe,
        "tokens": tokens,
        "wall_s": wall_s,
        "phases_s": run["phases"],
        "sweep_s": run["phases"]["sweep"],
        "peak_allocated_gib": max(row.get("peak_gib", 0.0) for row in metrics),
        "peak_used_gib": used_gib,
        "planned_gib": (run.get("planned_peak_bytes") or 0) / 2**30,
        "micro_batch": run.get("micro_batch"),
        "matmul_ceiling_tflops": ceiling,
        "kinds": by_kind(architecture, metrics, tokens, options.seq_len, ceiling * options.gpus),
    }
    result["ceiling_s"] = sum(kind["ceiling_s"] for kind in result["kinds"].values())
    result["share_of_ceiling"] = result["ceiling_s"] / result["sweep_s"]
    _show(result)
    if options.json:
        Path(options.json).write_text(json.dumps({**result, "layers": metrics}, indent=1))


def matmul_ceiling(size: int = 8192, seconds: float = 4.0) -> float:
    """TFLOP/s of a bf16 product of this size, repeated until the clocks have settled."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    done, start = 0, time.monotonic()
    while True:
        for _ in range(50):
            a @ b
        torch.cuda.synchronize()
        done += 50
        elapsed = time.monotonic() - start
        if elapsed > seconds:
            return 2 * size**3 * done / elapsed / 1e12


def flops_per_token(a: Architecture, kind: LayerType, seq_len: int) -> float:
    """Operations of one layer's matrix products for one token (attention's causal ones too)."""
    if kind is LayerType.mamba:
        weights = a.hidden_size * sum(a.mamba_in_parts) + a.mamba_intermediate_size * a.hidden_size
    elif kind is LayerType.attention:
        queries = a.num_attention_heads * a.head_dim
        weights = a.hidden_size * (2 * queries + 2 * a.num_key_value_heads * a.head_dim)
        weights += seq_len // 2 * queries * 2  # scores and mixing, over half the square
    elif kind is LayerType.moe:
        weights = a.num_experts_per_tok * 2 * a.expert_input_size * a.moe_intermediate_size
        weights += a.hidden_size * a.n_routed_experts
        if a.has_shared_experts:
            weights += 2 * a.hidden_size * a.moe_shared_expert_intermediate_size
        if a.moe_latent_size is not None:
            weights += 2 * a.hidden_size * a.moe_latent_size
    else:
        weights = 2 * a.hidden_size * a.intermediate_size
    return 2.0 * weights


def by_kind(
    architecture: Architecture,
    metrics: list[dict[str, Any]],
    tokens: int,
    seq_len: int,
    ceiling_tflops: float,
) -> dict[str, dict[str, float]]:
    """Seconds, stalls and share of the ceiling for each kind of layer."""
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in metrics:
        kind = seconds[row["type"]]
        kind["layers"] += 1
        for phase, value in row["seconds"].items():
            kind[f"{phase.replace(' ', '_')}_s"] += value
    for name, kind in seconds.items():
        flops = flops_per_token(architecture, LayerType(name), seq_len) * tokens * kind["layers"]
        kind["ceiling_s"] = flops / ceiling_tflops / 1e12
        kind["share_of_ceiling"] = kind["ceiling_s"] / kind["compute_s"]
    return {name: dict(kind) for name, kind in seconds.items()}


def _run(command: list[str]) -> tuple[float, float]:
    """Wall-clock seconds, and the largest memory in use on GPU 0 (sampled) in GiB."""
    used, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            free, total = torch.cuda.mem_get_info(0)
            used[0] = max(used[0], (total - free) / 2**30)

    watcher = threading.Thread(target=watch, daemon=True)
    torch.cuda.empty_cache()
    watcher.start()
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT)
    wall_s = time.monotonic() - start
    stop.set()
    watcher.join()
    return wall_s, used[0]


def _command(options: argparse.Namespace, report: Path) -> list[str]:
    launcher = [sys.executable]
    if options.gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(options.gpus)]
    return [
        *launcher,
        "-m",
        "launch.calibrate",
        "checkpoint=synthetic",
        f"model={options.model}",
        "output=discard",
        f"report={report}",
        f"recipe={options.recipe}",
        f"calibration.num_sequences={options.sequences}",
        f"calibration.seq_len={options.seq_len}",
        *options.option,
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in ("layersweep", "torch", "triton", "megatron-core", "mamba-ssm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{result['model']} on {result['hardware']}: {result['scope']}")
    for column in (
        "kind",
        "layers",
        "compute s",
        "ceiling s",
        "share",
        "read stall",
        "write stall",
    ):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for name, kind in result["kinds"].items():
        table.add_row(
            name,
            f"{kind['layers']:.0f}",
            f"{kind['compute_s']:.1f}",
            f"{kind['ceiling_s']:.1f}",
            f"{kind['share_of_ceiling']:.1%}",
            f"{kind['read_stall_s']:.2f}",
            f"{kind['write_stall_s']:.2f}",
        )
    console.print(table)
    console.print(
        f"sweep {result['sweep_s']:.1f} s, whole command {result['wall_s']:.1f} s; "
        f"products at {result['matmul_ceiling_tflops']:.0f} TFLOP/s would take "
        f"{result['ceiling_s']:.1f} s: {result['share_of_ceiling']:.1%}; "
        f"peak {result['peak_allocated_gib']:.1f} GiB allocated "
        f"({result['planned_gib']:.1f} planned), "
        f"{result['peak_used_gib']:.1f} GiB in use on the card"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--model", default="nemotron3_ultra", help="conf/model name or config.json")
    parser.add_argument("--recipe", default="nvfp4_four_over_six")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--json", help="where to store the figures")
    parser.add_argument("option", nargs="*", help="more options of launch.calibrate")
    return parser.parse_args()


if __name__ == "__main__":
    main()
