"""The Triton kernels without a GPU: `interpreted_kernels.py`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_give_the_bytes_of_the_reference():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CHECKS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=CHECKS.parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
