"""What recipes cost on the demo model, over several calibration seeds; the README's table.

    python -m bench.recipe_accuracy --json result.json

Runs `launch.compare` once for each seed, always on the same evaluation text (files of the standard
library that the demo model was not trained on), and prints a Markdown table: the middle of three
seeds, and in brackets how far the seeds lie apart. A difference between recipes that is smaller
than that says nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.demo.text import Split, write_jsonl

RECIPES = (
    "nvfp4_max",
    "nvfp4_four_over_six",
    "nvfp4_mse",
    "nvfp4_four_over_six_all",
    "nvfp4_routed_only",
    "nvfp4_four_over_six_first_moe_bf16",
    "fp8",
)
COLUMNS = ("recipe", "bits", "NVFP4 error / max", "mode", "perplexity / BF16", "KL", "top-1 %")


def main() -> None:
    """Runs the comparisons and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens, evaluated")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        text = scratch / "held_out.jsonl"
        write_jsonl(Split.evaluation, text)
        runs = [compare(options, seed, text, scratch) for seed in options.seeds]
    print("\n".join(markdown(runs)))
    notes = runs[0]["notes"]
    print(f"\n{time.monotonic() - begun:.0f} s; {notes[0] if notes else ''}")
    if options.json:
        values = {"date": time.strftime("%Y-%m-%d"), "argv": sys.argv[1:], "runs": runs}
        options.json.write_text(json.dumps(values, indent=1))


def compare(options: argparse.Namespace, seed: int, text: Path, scratch: Path) -> dict[str, Any]:
    """One comparison of all recipes; returns comparison.json."""
    report = scratch / f"seed-{seed}"
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "launch.compare"),
            *("checkpoint=demo", "data=demo", f"recipes=[{','.join(options.recipes)}]"),
            *("calibration.num_sequences=64", "calibration.seq_len=256"),
            *("calibration.micro_batch=8", f"calibration.seed={seed}"),
            f"evaluation.num_sequences={options.sequences}",
            f"evaluation.data={text}",
            f"report={report}",
        ],
        check=True,
        cwd=Path(__file__).parents[1],
    )
    result: dict[str, Any] = json.loads((report / "comparison.json").read_text())
    return result


def markdown(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The table, one line for each recipe and serving mode."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
    for index, row in enumerate(runs[0]["rows"]):
        same = [run["rows"][index] for run in runs]
        against = row["median_against_max"]
        head = (
            f"`{row['recipe']}`",
            f"{row['effective_bits']:.2f}",
            "" if against is None else f"{100 * (against - 1):+.1f} %",
        )
        for number, mode in enumerate(row["modes"]):
            of_seeds = [other["modes"][number] for other in same]
            ratios = [
                100 * (mode["perplexity"] / other["perplexity_bf16"] - 1)
                for mode, other in zip(of_seeds, same, strict=True)
            ]
            cells = (
                *(head if number == 0 else ("", "", "")),
                mode["mode"].upper(),
                _middle(ratios, "{:+.2f} %", "{:.2f}"),
                _middle([m["kl_mean"] for m in of_seeds], "{:.5f}", "{:.5f}"),
                _middle([100 * m["top1"] for m in of_seeds], "{:.2f}", "{:.2f}"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _middle(values: Sequence[float], shown: str, spread: str) -> str:
    """The median, and how far the values lie apart."""
    apart = max(values) - min(values)
    return f"{shown.format(statistics.median(values))} ({spread.format(apart)})"


if __name__ == "__main__":
    main()
