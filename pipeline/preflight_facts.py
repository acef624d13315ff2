"""What one rank knows of itself before anything long: software, settings, memory, room, clock.

In: the job as this rank prepared it. Out: `Facts`, plain values that rank 0 compares. Nothing is
judged here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.memory import MemoryPlan
from pipeline.runtime.peers import Peer

PACKAGES = ("triton", "megatron-core", "nvidia-modelopt", "transformers", "safetensors", "numpy")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A rank's GPU.

    Attributes:
        index: On its host.
        name: Of its kind.
        total: Bytes.
        free: Bytes that nobody has taken.
        ours: Bytes that this process's allocator has taken.
        others: Processes on it, as far as they can be seen from here.
    """

    index: int
    name: str
    total: int
    free: int
    ours: int
    others: str


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """What is left of a host's memory.

    Attributes:
        free: Bytes.
        limit: What limits it.
    """

    free: int
    limit: str


@dataclasses.dataclass(frozen=True)
class Room:
    """What is left on the output's file system; a quota does not show.

    Attributes:
        path: A directory on it.
        free: Bytes that a user may write.
        files: Files that a user may make; None where there is no limit.
    """

    path: str
    free: int
    files: int | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a rank tells rank 0.

    Attributes:
        peer: Its process.
        refusal: Why it cannot start at all; the rest is then missing.
        versions: Of software.
        settings: Every option by its full name.
        code: Digest of the installed package and its presets.
        source: Digest of the source's names, shapes and places.
        marks: Of the files of the source that the rank reads.
        faults: What the rank has found wrong.
        sees_token: Whether it sees the file that rank 0 has made; None where none was made.
        room: On the output's file system; None where nothing is written.
        memory: What the plan says; None where there is no plan.
        gpu: None on a CPU.
        host_memory: None where the system does not tell.
        host_needs: Bytes of host memory that the rank will take.
    """

    peer: Peer
    refusal: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    code: str = ""
    source: str = ""
    marks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    faults: tuple[str, ...] = ()
    sees_token: bool | None = None
    room: Room | None = None
    memory: MemoryPlan | None = None
    gpu: Gpu | None = None
    host_memory: HostMemory | None = None
    host_needs: int = 0


def software() -> dict[str, str]:
    """Versions of everything that could make a difference to the bytes or to the collectives."""
    found = {
        "layersweep": pipeline.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def settings_of(config: Any) -> dict[str, str]:
    """Every option of a configuration by its full name, as text."""
    return dict(_flatten("", dataclasses.asdict(config)))


def code_digest(conf_dir: Path) -> str:
    """Digest of the package's own files: two checkouts may have the same version."""
    digest = hashlib.sha256()
    home = Path(pipeline.__file__).parent
    for root, pattern in ((home, "*.py"), (conf_dir, "*.yaml")):
        for path in sorted(root.rglob(pattern)):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def source_digest(tensors: Mapping[str, Any]) -> str:
    """Digest of names, dtypes, shapes and places; not of times, which copies do not share."""
    lines = []
    for name, info in tensors.items():
        lines.append(f"{name} {info.dtype} {info.shape}")
        if isinstance(info, TensorInfo):
            lines.append(f"{info.path.name} {info.start}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def look_at_room(directory: Path) -> Room:
    """Room on the file system of a directory, or of the nearest one above it that exists."""
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    status = os.statvfs(nearest)
    # Some file systems count no files.
    files = status.f_favail if status.f_files else None
    return Room(str(nearest), status.f_bavail * status.f_frsize, files)


def look_at_gpu(device: torch.device) -> Gpu | None:
    """Memory of the device, if it is a GPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    try:
        others = torch.cuda.list_gpu_processes(device)
    except (RuntimeError, OSError, ImportError):
        others = ""
    own = f"process {os.getpid():>10d} "
    found = [
        " ".join(line.split())
        for line in others.splitlines()
        if line.startswith("process ") and not line.startswith(own)
    ]
    return Gpu(
        torch.cuda.current_device() if device.index is None else device.index,
        torch.cuda.get_device_name(device),
        total,
        free,
        torch.cuda.memory_reserved(device),
        ", ".join(found),
    )


def look_at_host_memory(
    meminfo: Path = _MEMINFO,
    cgroup: Path = Path("/proc/self/cgroup"),
    cgroups: Path = _CGROUPS,
) -> HostMemory | None:
    """The least of what the kernel says is available and what the control groups leave."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        return None
    least = HostMemory(int(found[1]) * 1024, "MemAvailable")
    for directory, names in _memory_groups(cgroup, cgroups):
        left = _left_in_group(directory, *names)
        if left is not None and left < least.free:
            least = HostMemory(left, f"the limit of the control group {directory}")
    return least


def _memory_groups(cgroup: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Directories of this process's groups, the innermost first, of either version."""
    try:
        lines = [line.split(":", 2) for line in cgroup.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container the path may be that of the host, which is not there.
        for directory in (inner, *inner.parents):
            if directory.is_dir():
                yield directory, names
            if directory == root:
                break


def _left_in_group(directory: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes that a group may still take; files that were read count as taken, but give way."""
    try:
        most = (directory / limit).read_text().strip()
        used = int((directory / usage).read_text())
        statistics = (directory / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if not most.isdecimal():  # "max"
        return None
    found = re.search(rf"^{cache} (\d+)$", statistics, re.MULTILINE)
    return int(most) - used + (int(found[1]) if found else 0)


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, str(value.value if isinstance(value, Enum) else value)
