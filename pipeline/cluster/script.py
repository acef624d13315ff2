"""The batch script of a job: one file of plain bash, with every value quoted.

In: a checked job, and the options of its cluster. Out: the text of slurm.sh.jinja with them filled
in. What the script does about signals, restarts and exit statuses is said there, where it is read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.cluster.options import (
    CORES_PER_RANK,
    ContainerConfig,
    ContainerRuntime,
    JobName,
    SlurmConfig,
)
from pipeline.errors import ConfigError

TEMPLATE = "slurm.sh.jinja"
LAST_WORDS_S = 90
"""After one node's ranks have ended, for those of the others to end by themselves."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job whose options were checked.

    Attributes:
        name: Which command.
        words: Its command line.
        directory: Where it was submitted: what its paths are relative to.
        output: The directory that it makes, as its own process sees it; None for a job of which
            nothing is kept before its end.
    """

    name: JobName
    words: tuple[str, ...]
    directory: Path
    output: Path | None

    @property
    def has_ranks(self) -> bool:
        """Whether several processes share it."""
        return self.name is not JobName.verify

    @property
    def module(self) -> str:
        """What Python runs."""
        return f"launch.{self.name.value}"

    @property
    def title(self) -> str:
        """In a queue: what is made, or done."""
        what = self.name.value if self.output is None else self.output.name
        return "layersweep-" + re.sub(r"[^\w.-]+", "-", what)


def render(job: SubmittedJob, config: SlurmConfig, python: str) -> str:
    """The batch script.

    Args:
        job: What it runs.
        config: How.
        python: Interpreter of the nodes, unless the options name one.

    Raises:
        ConfigError: A combination that cannot work.
    """
    _check(job, config)
    if config.python is not None or config.container.runtime is not None:
        python = config.python or "python3"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # what goes in is quoted for a shell
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    nodes = f"{config.nodes} node{'s' * (config.nodes > 1)}"
    ranks = f" of {config.ranks} rank{'s' * (config.ranks > 1)}" if job.has_ranks else ""
    return environment.get_template(TEMPLATE).render(
        title=f"{job.name.value} on {nodes}{ranks}",
        directives=_directives(job, config),
        directory=quote(str(job.directory)),
        environment=[(name, quote(text)) for name, text in config.environment.items()],
        setup=config.setup,
        torchrun=job.has_ranks,
        start=_start(job, config, python),
        job=[f"-m {job.module}", *map(quote, job.words)],
        goes_on=job.output is not None,
        output=quote(str(_host_path(job.output, config.container))),
        status=_status(job, config.container, python),
        signal_seconds=config.signal_seconds,
        max_restarts=config.max_restarts if job.output is not None else 0,
        restart_after_crash=config.restart_after_crash,
    )


def log_file(job: SubmittedJob, config: SlurmConfig) -> Path:
    """Where Slurm writes the log; %j stands for the job's number."""
    name = (config.name or job.title).replace("%", "%%").replace("/", "-")
    folder = str(job.directory / Path(config.logs).expanduser()).replace("%", "%%")
    return Path(folder) / f"{name}-%j.log"


def host_output(job: SubmittedJob, config: SlurmConfig) -> Path | None:
    """The output directory as this machine sees it, which has no container."""
    return None if job.output is None else _host_path(job.output, config.container)


def quote(word: str) -> str:
    """A word for the shell that it comes out of as it went in, in the form that reads best."""
    if "'" not in word:
        quoted = shlex.quote(word)
        # A bare comma in an array looks like a mistake, to readers and to shellcheck.
        return f"'{word}'" if "," in word and quoted == word else quoted
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'


def _check(job: SubmittedJob, config: SlurmConfig) -> None:
    log = str(log_file(job, config))
    if any(sign in log for sign in '"\\\n'):
        raise ConfigError(
            "cluster.logs",
            value=repr(log),
            rule="Slurm reads quotes, backslashes and line breaks in a log's path in its own way",
            remedy="give cluster.logs=DIR without them",
        )
    if not job.has_ranks and (config.nodes > 1 or (config.ranks_per_node or 1) > 1):
        raise ConfigError(
            "cluster.nodes, cluster.ranks_per_node",
            value=f"{config.nodes}, {config.ranks}",
            rule=f"{job.name.value} is one process",
            remedy="leave them out",
        )


def _directives(job: SubmittedJob, config: SlurmConfig) -> list[str]:
    """The #SBATCH lines but the signal's; one task of each node starts its ranks."""
    cores = config.cpus_per_task or CORES_PER_RANK * (config.ranks if job.has_ranks else 1)
    gpus = config.gpus_per_node if job.has_ranks else 0
    values = {
        "job-name": config.name or job.title,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cores,
        "gpus-per-node": gpus or None,
        "mem": config.memory,
        "time": config.time,
        "output": f'"{log_file(job, config)}"',
    }
    restarts = job.output is not None and config.max_restarts > 0
    return [
        *(f"--{name}={value}" for name, value in values.items() if value is not None),
        "--open-mode=append",
        "--requeue" if restarts else "--no-requeue",
        *config.directives,
    ]


def _start(job: SubmittedJob, config: SlurmConfig, python: str) -> list[str]:
    """Lines of the array that starts the ranks, in front of the job's module."""
    nodes, container = config.nodes, config.container
    cores = '--cpus-per-task="$SLURM_CPUS_PER_TASK"'
    lines = [
        f"srun --nodes={nodes} --ntasks-per-node=1 {cores}",
        f"--kill-on-bad-exit=0 --wait={LAST_WORDS_S}",
        *_in_container(container, job.directory, has_gpus=config.gpus_per_node > 0),
        quote(python),
    ]
    if job.has_ranks:
        lines[-1] += " -m torch.distributed.run"
        lines += [
            f"--nnodes={nodes} --nproc-per-node={config.ranks} --max-restarts=0",
            '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$(hostname):$port"',
        ]
    return lines


def _status(job: SubmittedJob, container: ContainerConfig, python: str) -> str:
    """The command that says what has become of the run."""
    words = []
    if container.runtime is not None:
        words = ["srun --nodes=1 --ntasks=1"]
        words += _in_container(container, job.directory, has_gpus=False)
    words += [
        f"{quote(python)} -m launch.status",
        quote(str(job.output)),
        'started_at="$started_at"',
    ]
    return " ".join(words)


def _in_container(container: ContainerConfig, directory: Path, *, has_gpus: bool) -> list[str]:
    """What stands between srun and the command, and puts the command into the container."""
    if container.runtime is None:
        return []
    assert container.image is not None
    mounts = list(container.mounts)
    if _host_of(directory, mounts) is None:
        mounts.append(f"{directory}:{directory}")
    options = [" ".join(map(quote, container.options))] if container.options else []
    if container.runtime is ContainerRuntime.pyxis:
        return [
            quote(f"--container-image={container.image}"),
            quote(f"--container-mounts={','.join(mounts)}"),
            quote(f"--container-workdir={directory}"),
            *options,
        ]
    return [
        "apptainer exec --nv" if has_gpus else "apptainer exec",
        *(f"--bind {quote(mount)}" for mount in mounts),
        f"--pwd {quote(str(directory))}",
        *options,
        quote(container.image),
    ]


def _host_path(path: Path | None, container: ContainerConfig) -> Path | None:
    """A path of the container as the host knows it."""
    if path is None or container.runtime is None:
        return path
    return _host_of(path, container.mounts) or path


def _host_of(path: Path, mounts: Sequence[str]) -> Path | None:
    """Where the innermost mount that holds a path of the container has it on the host."""
    found: list[tuple[int, Path]] = []
    for mount in mounts:
        host, *rest = mount.split(":")
        inside = rest[0] if rest else host
        if path.is_relative_to(inside):
            found.append((len(Path(inside).parts), Path(host) / path.relative_to(inside)))
    return max(found)[1] if found else None
