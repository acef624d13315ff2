"""Options of `launch.submit` and `launch.status`, each on its own checked.

In: values of the command line and of conf/job/cluster/. Out: dataclasses. Each is explained in
conf/job/cluster/, conf/job/submit.yaml and conf/job/status.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pipeline.errors import ConfigError

LONGEST_SIGNAL_S = 65535
"""Slurm's own limit of --signal."""
CORES_PER_RANK = 4
"""What reading, packing and checksums of a rank keep busy."""

# days-hours[:minutes[:seconds]] or [hours:]minutes:seconds, as sbatch reads them.
_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(?:(\d+):)?(\d+):(\d+))")
_MEMORY = re.compile(r"\d+[KMGT]?")
_WORD = re.compile(r"[\w.,:+@/=-]+")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
# What the script relies on, by the options that say it (or by nothing that may be changed).
_OURS = {
    **dict.fromkeys(("job-name", "J"), "cluster.name"),
    **dict.fromkeys(("partition", "p"), "cluster.partition"),
    **dict.fromkeys(("account", "A"), "cluster.account"),
    **dict.fromkeys(("qos", "q"), "cluster.qos"),
    **dict.fromkeys(("nodes", "N"), "cluster.nodes"),
    **dict.fromkeys(("time", "t"), "cluster.time"),
    **dict.fromkeys(("cpus-per-task", "c"), "cluster.cpus_per_task"),
    **dict.fromkeys(("output", "o", "error", "e"), "cluster.logs"),
    "mem": "cluster.memory",
    "signal": "cluster.signal_seconds",
    **dict.fromkeys(("requeue", "no-requeue"), "cluster.max_restarts"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node", "open-mode", "array", "a"), ""),
    **dict.fromkeys(("chdir", "D", "wrap", "parsable", "wait", "W"), ""),
}


class JobName(Enum):
    """What is submitted."""

    calibrate = "calibrate"
    compare = "compare"
    evaluate = "evaluate"
    verify = "verify"


class ContainerRuntime(Enum):
    """What runs a container on the nodes."""

    pyxis = "pyxis"
    apptainer = "apptainer"


class StatusOutput(Enum):
    """How `launch.status` answers."""

    text = "text"
    json = "json"


@dataclass(kw_only=True)
class ContainerConfig:
    """The container that the ranks run in; none without a runtime."""

    runtime: ContainerRuntime | None = None
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """A runtime and an image go together, and mounts are absolute."""
        if (self.runtime is None) != (self.image is None):
            absent = "image" if self.image is None else "runtime"
            raise ConfigError(
                f"cluster.container.{absent}",
                value="nothing",
                rule="a container has a runtime and an image",
                remedy="give cluster.container.runtime=pyxis or apptainer, and "
                "cluster.container.image=IMAGE; or neither",
            )
        if self.runtime is None and (self.mounts or self.options):
            raise ConfigError(
                "cluster.container.mounts, cluster.container.options",
                value=", ".join([*self.mounts, *self.options]),
                rule="they go with a container",
                remedy="give cluster.container.runtime and cluster.container.image too",
            )
        for mount in self.mounts:
            parts = mount.split(":")
            are_absolute = all(part.startswith("/") for part in parts[:2])
            if len(parts) > 3 or not are_absolute or "," in mount:
                raise ConfigError(
                    "cluster.container.mounts",
                    value=mount,
                    rule="is /HOST/PATH or /HOST/PATH:/PATH, maybe with :FLAGS, without commas",
                    remedy="give absolute paths",
                )


@dataclass(kw_only=True)
class LocalConfig:
    """One process on this machine."""

    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None

    def __post_init__(self) -> None:
        """Variables have names that a shell knows."""
        _check_environment(self.environment)


@dataclass(kw_only=True)
class TorchrunConfig:
    """Several ranks on this machine."""

    ranks_per_node: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None

    def __post_init__(self) -> None:
        """At least one rank; variables have names that a shell knows."""
        _check_least(self, ranks_per_node=1)
        _check_environment(self.environment)


@dataclass(kw_only=True)
class SlurmConfig:
    """A batch job of Slurm."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: Any = None
    time: Any = None
    signal_seconds: int = 180
    max_restarts: int = 3
    restart_after_crash: bool = False
    name: str | None = None
    logs: str = "layersweep-jobs"
    directives: list[str] = field(default_factory=list)
    container: ContainerConfig = field(default_factory=ContainerConfig)
    environment: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    python: str | None = None

    def __post_init__(self) -> None:
        """Checks what sbatch would refuse, or misread, and what the script relies on."""
        _check_least(
            self,
            nodes=1,
            gpus_per_node=0,
            ranks_per_node=1,
            cpus_per_task=1,
            signal_seconds=1,
            max_restarts=0,
        )
        _check_environment(self.environment)
        self._check_words()
        self._check_time()
        for directive in self.directives:
            _check_directive(directive)
        for line in self.setup:
            if "\n" in line:
                raise ConfigError(
                    "cluster.setup",
                    value=repr(line),
                    rule="is a list of single lines of the script",
                    remedy="make an item of each line",
                )
        if self.restart_after_crash and not self.max_restarts:
            raise ConfigError(
                "cluster.restart_after_crash",
                value="true, with cluster.max_restarts=0",
                rule="a restart must be allowed",
                remedy="raise cluster.max_restarts",
            )

    @property
    def ranks(self) -> int:
        """Processes on each node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    def _check_words(self) -> None:
        """Values that go into #SBATCH lines, which have no quotes that can be relied on."""
        for name in ("partition", "account", "qos", "name"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise ConfigError(
                    f"cluster.{name}",
                    value=repr(value),
                    rule="is one word of letters, digits and . , : + @ / = - _",
                    remedy="correct it",
                )
        if self.memory is not None and not _MEMORY.fullmatch(str(self.memory)):
            raise ConfigError(
                "cluster.memory",
                value=self.memory,
                rule="is a number of MiB, or one with K, M, G or T; 0 is all that a node has",
                remedy="write for example cluster.memory=512G",
            )
        for name in ("logs", "python"):
            value = getattr(self, name)
            if value is not None and (not value or "\n" in value or "\\" in value):
                raise ConfigError(
                    f"cluster.{name}",
                    value=repr(value),
                    rule="is a path without line breaks and backslashes, which Slurm would read",
                    remedy="choose another",
                )

    def _check_time(self) -> None:
        """A time limit that means the same to YAML, to Slurm and to the reader."""
        if self.signal_seconds > LONGEST_SIGNAL_S:
            raise ConfigError(
                "cluster.signal_seconds",
                value=self.signal_seconds,
                rule=f"is at most {LONGEST_SIGNAL_S} (Slurm's limit)",
                remedy="lower it",
            )
        if self.time is None:
            return
        seconds = seconds_of(self.time) if isinstance(self.time, str) else None
        if seconds is None:
            raise ConfigError(
                "cluster.time",
                value=repr(self.time),
                rule="is HOURS:MINUTES:SECONDS, DAYS-HOURS or DAYS-HOURS:MINUTES:SECONDS (a bare "
                "number is minutes to Slurm, and YAML reads 4:00:00 without quotes as 14400)",
                remedy='write cluster.time=4:00:00, or time: "4:00:00" in a file',
            )
        if seconds <= self.signal_seconds:
            raise ConfigError(
                "cluster.time",
                value=self.time,
                rule=f"must be longer than cluster.signal_seconds={self.signal_seconds}: so long "
                "before its end the job is told to stop",
                remedy="raise cluster.time, or lower cluster.signal_seconds",
            )


@dataclass(kw_only=True)
class SubmitConfig:
    """What `launch.submit` itself is told; everything else are options of the job."""

    cluster: Any = None
    job: JobName = JobName.calibrate
    dry_run: bool = False


@dataclass(kw_only=True)
class StatusConfig:
    """Options of `launch.status`."""

    directory: str | None = None
    started_at: float | None = None
    output: StatusOutput = StatusOutput.text


def seconds_of(time: str) -> int | None:
    """A time limit of Slurm in seconds; None if it is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, day_hours, day_minutes, day_seconds, hours, minutes, seconds = (
        int(part or 0) for part in match.groups()
    )
    if match[1] is not None:
        return ((days * 24 + day_hours) * 60 + day_minutes) * 60 + day_seconds
    return (hours * 60 + minutes) * 60 + seconds


def _check_least(config: object, **least: int) -> None:
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise ConfigError(
                f"cluster.{name}", value=value, rule=f"must be at least {lowest}", remedy="raise it"
            )


def _check_environment(environment: Mapping[str, str]) -> None:
    for name in environment:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                "cluster.environment",
                value=repr(name),
                rule="a variable's name has letters, digits and _, and begins with no digit",
                remedy="correct it",
            )


def _check_directive(directive: str) -> None:
    """A further line of sbatch's, which must not undo what the script relies on."""
    name = re.split(r"[=\s]", directive.lstrip("-"), maxsplit=1)[0]
    if not re.fullmatch(r"--?[A-Za-z][^\n]*", directive):
        raise ConfigError(
            "cluster.directives",
            value=repr(directive),
            rule="each is one option of sbatch, such as --constraint=h100",
            remedy="correct it",
        )
    if not directive.startswith("--"):
        name = name[:1]
    if name in _OURS:
        own = _OURS[name]
        raise ConfigError(
            "cluster.directives",
            value=repr(directive),
            rule="the script sets this one itself",
            remedy=f"use {own}" if own else "leave it out",
        )
