"""A Python process beside this one, that runs one of the project's modules.

In: the module's name. Out: the process, with its stdin to write to. It has this process's
environment and working directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

_ROOT = Path(__file__).resolve().parents[2]

# Linux kills the process when the one that started it ends, however it ends: 1 is PR_SET_PDEATHSIG
# of prctl(2). Said before anything is imported, which takes seconds.
_BOOTSTRAP = """
import ctypes, runpy, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, signal.SIGKILL)
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


def start_module(module: str, stderr: IO[str]) -> subprocess.Popen[str]:
    """Starts `python -m module`; its stdout goes nowhere, and it ends with this process.

    Raises:
        OSError: It could not be started.
    """
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _BOOTSTRAP, module],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
