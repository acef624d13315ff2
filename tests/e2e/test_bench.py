"""The scripts that measure still run: on the demo's shape, on a CPU; their figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_layers_are_timed_and_the_other_scripts_import(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    code = (
        "import sys, bench.full_model, bench.kernels, bench.disk, bench.vs_modelopt, bench.layers;"
        "bench.layers.main()"
    )
    options = ["--model", "demo", "--seq-len", "32", "--batches", "1,2", "--seconds", "0.05"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *options, "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(path.read_text())["layers"]
    assert {row["kind"] for row in rows} == {"mamba", "moe", "attention"}
    assert all(row["ms"] > 0 for row in rows)
    assert {row["tokens"] for row in rows} == {32, 64}
