"""What torchrun and Slurm tell through the environment, and what torchrun is told.

In: environment variables. Out: this attempt's job; the file from which torchrun's summary takes the
cause of a failure, which is otherwise an empty traceback.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path


def slurm_job() -> dict[str, str | int | None]:
    """The job's id, and how often Slurm has put it into the queue again."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return {
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "restart": int(restart) if restart.isdecimal() else 0,
    }


def torchrun_pid() -> int | None:
    """The process of torchrun that started this one; None without torchrun."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def torchrun_holds_store() -> bool:
    """Whether the store by which the ranks connect is torchrun's (else it is rank 0's)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def tell_torchrun(text: str, time_s: float) -> None:
    """Leaves the cause of this process's end for torchrun; the earliest is shown as root cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time_s))}
    with suppress(OSError):  # torchrun then shows no cause; the last line of the log does
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def has_another_told() -> bool:
    """Whether another rank of this host has left the cause of its end for torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    mine = Path(path)
    return any(other != mine for other in mine.parent.parent.glob(f"*/{mine.name}"))
