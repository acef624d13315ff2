"""What a benchmark says of the machine it ran on: hardware and versions, nothing that names it."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch


def process_state(pid: int) -> str:
    """One letter, as the system has it: R, S, T ...; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def describe_machine(directory: Path) -> dict[str, Any]:
    """Hardware and versions; nothing that names the machine."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else 'unknown'}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "disk": describe_disk(directory),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kernel": platform.release().split("-")[0],
        },
    }


def describe_disk(directory: Path) -> str:
    """File system, and the disk below it where that is one."""
    kind, longest = "unknown file system", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, this_kind, *_ = line.split()
        if directory.resolve().is_relative_to(mount) and len(mount) >= len(longest):
            kind, longest = this_kind, mount
    device = os.stat(directory).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for candidate in (block, block.parent):
        model = candidate / "device" / "model"
        if model.is_file():
            return f"{kind} on {model.read_text().strip()}"
    return f"{kind} on {''.join(c for c in block.name if c.isalpha()) or 'no block device'}"
