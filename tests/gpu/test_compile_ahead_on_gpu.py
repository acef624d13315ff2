"""What is compiled ahead is all that a sweep needs: none of it compiles a kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

# Prints how many kernels Triton's cache holds before the sweep, and the names of those after it.
JOB = """
import sys
from pathlib import Path
from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.config import Device
from pipeline.sweep import Sweep
from tests.e2e.harness import golden_config

cache, output = Path(sys.argv[1]), Path(sys.argv[2])
run = Sweep.run

def compiled():
    return {path for path in cache.rglob("*.cubin")}

def watch(sweep):
    before = compiled()
    run(sweep)
    print("BEFORE", len(before))
    print("ADDED", sorted(path.stem for path in compiled() - before))

Sweep.run = watch
if __name__ == "__main__":
    calibrate(golden_config(output, device=Device.cuda), CONF_DIR, Place(0, 1, 0), "")
"""


def test_the_sweep_compiles_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JOB, str(cache), str(tmp_path / "out")],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert int(lines["BEFORE"]) > 10
    assert lines["ADDED"] == "[]"
