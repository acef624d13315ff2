"""The layers' Triton kernels without a GPU: `interpreted_kernels`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_kernels_mean_what_plain_torch_means() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    subprocess.run(
        [sys.executable, "-m", "tests.unit.mcore.interpreted_kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=120,
    )
