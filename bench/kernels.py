"""Times the NVFP4 and FP8 kernels on one expert stack against the card's own copy rate.

Run from the repository on a GPU: `python -m bench.kernels --json FILE`. The stack is a layer's
up_proj of Nemotron 3 Ultra, 512 x 5120 x 2048 in bf16 (10.7 GB), filled on the device with
heavy-tailed random weights. Bytes per second count every byte read and written once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.kernels_nvfp4 import empty_packed

ULTRA_UP_PROJ = (512, 5120, 2048)
TAIL = 0.5  # of the exponent of the log-normal scale of rows: heavy-tailed, like real experts


def main() -> None:
    """Measures, prints a table and writes the figures where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=ULTRA_UP_PROJ, metavar=("E", "N", "K")
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the median counts")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures = measure(tuple(arguments.shape), arguments.repeats)
    Console().print(as_table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Returns what was run, on what, and the time and rate of every kernel."""
    copy_rate = measure_copy_rate(repeats)
    stack = heavy_tailed_stack(shape)
    rows = []
    for name, (n_bytes, run) in kernels(stack).items():
        seconds = median_seconds(run, repeats)
        rate = n_bytes / seconds
        rows.append({
            "kernel": name,
            "ms": round(seconds * 1e3, 3),
            "tb_per_s": round(rate / 1e12, 3),
            "share_of_copy_rate": round(rate / copy_rate, 3),
        })  # fmt: skip
    ms = {row["kernel"]: row["ms"] for row in rows}
    return {
        "hardware": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "command": " ".join(["python -m bench.kernels", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "shape": list(shape),
        "dtype": "bfloat16",
        "copy_tb_per_s": round(copy_rate / 1e12, 3),
        "kernels": rows,
        "mse_over_four_over_six": round(ms["mse"] / ms["four_over_six"], 2),
    }


def kernels(stack: torch.Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    """Returns the bytes that each kernel moves, and a call of it."""
    backend = get_backend("triton")
    amax = backend.tensor_amax(stack)
    out = empty_packed(stack)
    codes = torch.empty(stack.shape, dtype=torch.float8_e4m3fn, device=stack.device)
    n_read = stack.numel() * stack.element_size()
    n_packed = out.codes.numel() + out.weight_scale.numel()

    def pack(method: WeightMethod, compare_to_max: bool) -> Callable[[], object]:
        return lambda: backend.pack_nvfp4(
            stack, amax, method, compare_to_max=compare_to_max, out=out
        )

    both = n_read + n_packed
    return {
        "tensor_amax": (n_read, lambda: backend.tensor_amax(stack)),
        "max": (both, pack(WeightMethod.max, False)),
        "max_dynamic": (both, pack(WeightMethod.max_dynamic, False)),
        "four_over_six": (both, pack(WeightMethod.four_over_six, False)),
        "four_over_six, compared to max": (both, pack(WeightMethod.four_over_six, True)),
        "mse": (both, pack(WeightMethod.mse, False)),
        "mse, compared to max": (both, pack(WeightMethod.mse, True)),
        "pack_fp8": (n_read + stack.numel(), lambda: backend.pack_fp8(stack, amax, codes)),
        "fp8_squared_errors (1, 1.5)": (
            n_read,
            lambda: backend.fp8_squared_errors(stack, amax, (1.0, 1.5)),
        ),
        "dequantize to bf16": (both, lambda: backend.dequantize_nvfp4(out, torch.bfloat16)),
    }


def heavy_tailed_stack(shape: tuple[int, ...]) -> torch.Tensor:
    """Returns bf16 weights whose rows have log-normal scales, made matrix by matrix."""
    generator = torch.Generator("cuda").manual_seed(0)
    stack = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for matrix_NK in stack:
        n_rows = len(matrix_NK)
        scale_N1 = torch.randn(n_rows, 1, device="cuda", generator=generator).mul_(TAIL).exp_()
        weight_NK = torch.randn(matrix_NK.shape, device="cuda", generator=generator)
        matrix_NK.copy_(weight_NK.mul_(scale_N1).mul_(0.02))
    return stack


def measure_copy_rate(repeats: int) -> float:
    """Returns bytes read and written per second by a copy of 4 GiB within the card."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), repeats)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Returns the median of timed runs, after one that compiles and warms up."""
    run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def as_table(figures: dict[str, Any]) -> Table:
    """Lays the figures out for a terminal."""
    shape = " x ".join(str(size) for size in figures["shape"])
    table = Table(
        title=f"{shape} bf16 on {figures['hardware']}; copy: {figures['copy_tb_per_s']} TB/s",
        caption=f"mse takes {figures['mse_over_four_over_six']} times as long as four_over_six",
    )
    for column in ("kernel", "ms", "TB/s", "of copy rate"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in figures["kernels"]:
        share = f"{row['share_of_copy_rate']:.0%}"
        table.add_row(row["kernel"], f"{row['ms']:.2f}", f"{row['tb_per_s']:.2f}", share)
    return table


if __name__ == "__main__":
    main()
