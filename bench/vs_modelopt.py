"""Model Optimizer's Hugging Face path and this project on one MoE layer, on one device, in one run.

    python -m bench.vs_modelopt --json bench/results/vs_modelopt.json
    python -m bench.vs_modelopt --layers-shape small        # a try on a CPU

Both sides get the same random weights and the same hidden states, one after the other, each in a
process of its own. Measured are tokens per second while calibrating (at every micro-batch; each
side's best one counts), seconds to choose weight scales, to pack and to write to the same directory
(a RAM disk unless told otherwise), and peak device memory. Then the two exports are compared byte
for byte. A side that fails leaves what it measured before, and the end of its log.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.one_moe_layer.layer import SHAPES, Layer
from bench.one_moe_layer.report import show, summarize
from bench.one_moe_layer.timing import Figures

PUBLISHED = "models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6"
WITHOUT_SEARCH = "models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-max-calib"
SIDES = ("modelopt", "ours")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "nvidia-modelopt",
    "megatron-core",
    "safetensors",
    "accelerate",
)
OUR_SEQUENCES, THEIR_SEQUENCES = 256, 32
LOG_LINES = 25
RAM_DISK = Path("/dev/shm")


def main() -> None:
    """Runs both sides, compares, shows, and writes the JSON file."""
    options = parse()
    if options.side:
        run_side(options)
        return
    layer = Layer(SHAPES[options.layers_shape], torch.device(options.device), options.seed)
    notes = []
    if options.recipe == WITHOUT_SEARCH:
        notes.append(
            "Model Optimizer's four-over-six search needs CUDA: on a CPU both sides use "
            f"{WITHOUT_SEARCH} (max), and nothing here is a speed worth quoting"
        )
    base = find_room(options.directory, layer.export_bytes * 2)
    with tempfile.TemporaryDirectory(prefix="vs_modelopt_", dir=base) as name:
        directory = Path(name)
        touch(directory, layer.export_bytes * 2)
        sides = {side: start_side(side, options, directory) for side in options.sides}
        result: dict[str, Any] = describe(options, directory)
        result |= {"notes": notes, "sides": sides, "ratios": summarize(sides)}
        save(result, options.json)  # what was measured is safe, whatever comes of comparing
        failed = any("error" in side for side in sides.values())
        if len(sides) == len(SIDES) and not failed:
            from bench.one_moe_layer.compare import compare

            result["comparison"] = compare(layer, directory / "ours", directory / "modelopt")
            save(result, options.json)
    show(result)
    if failed:
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line, with defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers-shape", choices=SHAPES, default="ultra")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", help="a name in Model Optimizer's library")
    parser.add_argument(
        "--batches",
        type=_numbers,
        default=[1, 2, 4, 8],
        help="sequences per forward call to try on our side (default 1,2,4,8)",
    )
    parser.add_argument(
        "--batches-modelopt",
        type=_numbers,
        default=[1, 2, 4, 8, 16, 32],
        help="the same of Model Optimizer, whose cost is mostly per call (default 1,2,4,8,16,32)",
    )
    parser.add_argument("--tokens-ours", type=int, help="calibration tokens of each measurement")
    parser.add_argument("--tokens-modelopt", type=int, help="the same of Model Optimizer")
    parser.add_argument("--limit", type=float, default=12.0, help="seconds per measurement")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds per side")
    parser.add_argument("--directory", type=Path, help=f"where to export (default {RAM_DISK})")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if on_cpu and options.layers_shape == "ultra":
        parser.error("the ultra shape needs a GPU; on a CPU give --layers-shape small")
    options.recipe = options.recipe or (WITHOUT_SEARCH if on_cpu else PUBLISHED)
    if on_cpu and options.recipe == PUBLISHED and "modelopt" in options.sides:
        parser.error("Model Optimizer's four-over-six search needs CUDA; use --sides ours")
    seq_len = SHAPES[options.layers_shape].seq_len
    options.tokens_ours = options.tokens_ours or OUR_SEQUENCES * seq_len
    options.tokens_modelopt = options.tokens_modelopt or THEIR_SEQUENCES * seq_len
    return options


def save(result: dict[str, Any], path: Path | None) -> None:
    """Writes the JSON file, if one is wanted."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def find_room(chosen: Path | None, nbytes: int) -> Path:
    """The chosen directory, or else the RAM disk, or else one for temporary files; with room."""
    candidates = [chosen] if chosen else [RAM_DISK, Path(tempfile.gettempdir())]
    for path in candidates:
        if path.is_dir() and shutil.disk_usage(path).free > nbytes * 1.1:
            return path
    sys.exit(
        f"no room for {nbytes * 1.1 / 1e9:.1f} GB in {' or '.join(map(str, candidates))}; "
        "give --directory on a larger file system"
    )


def touch(directory: Path, nbytes: int) -> None:
    """Writes and removes as much as both exports weigh: memory of a RAM disk is then at hand.

    Otherwise the side that comes first pays for a virtual machine's memory growing under it.
    """
    path = directory / "touch"
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, nbytes, 2**26):
            file.write(bytes(2**26))
    path.unlink()


def start_side(side: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Runs one side in a process of its own; returns its figures, and its error if it failed."""
    command = [sys.executable, "-m", "bench.vs_modelopt", *sys.argv[1:], "--side", side]
    command += ["--directory", str(directory), "--recipe", options.recipe]
    log = directory / f"{side}.log"
    sys.stdout.write(f"{side} ...\n")
    sys.stdout.flush()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    error = None
    with open(log, "wb") as output:
        try:
            subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=options.timeout,
                env=environment,
                check=True,
            )
        except subprocess.TimeoutExpired:
            error = f"not done after {options.timeout:g} s"
        except subprocess.CalledProcessError as failure:
            error = f"exit status {failure.returncode}"
    path = directory / f"{side}.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"notes": []}
    if error:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        figures["error"] = "\n".join([error, *tail])
    else:
        files = (directory / side).glob("*.safetensors")
        figures["exported_bytes"] = sum(path.stat().st_size for path in files)
    return figures


def run_side(options: argparse.Namespace) -> None:
    """The body of a side's process."""
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    layer = Layer(SHAPES[options.layers_shape], device, options.seed)
    figures = Figures(options.directory / f"{options.side}.json", device)
    output = options.directory / options.side
    output.mkdir()
    if options.side == "modelopt":
        from bench.one_moe_layer import theirs

        theirs.run(
            layer,
            figures,
            output,
            recipe=options.recipe,
            batches=options.batches_modelopt,
            tokens=options.tokens_modelopt,
            limit_s=options.limit,
        )
        return
    from bench.one_moe_layer import ours

    ours.run(
        layer,
        figures,
        output,
        recipe=options.recipe,
        batches=options.batches,
        tokens=options.tokens_ours,
        sequences=options.tokens_modelopt // layer.shape.seq_len,
        limit_s=options.limit,
    )


def describe(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """What was run, on what, with which versions."""
    hardware: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "host_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    }
    if options.device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        hardware |= {"gpu": properties.name, "gpu_gib": properties.total_memory / 2**30}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        hardware["driver"] = answer.stdout.strip()
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python -m bench.vs_modelopt", *sys.argv[1:]]),
        "hardware": hardware,
        "versions": versions,
        "shape": options.layers_shape,
        "recipe": options.recipe,
        "tokens": {"ours": options.tokens_ours, "modelopt": options.tokens_modelopt},
        "directory": str(directory.parent),
    }


if __name__ == "__main__":
    main()
