"""Runs a job on this machine, in the foreground: one process, or the ranks of torchrun.

In: a checked job and the environment. Out: its exit status: what the run's files tell, because
torchrun exits with 1 whatever its ranks said.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from pipeline.cluster.describe import describe
from pipeline.cluster.options import LocalConfig, TorchrunConfig
from pipeline.cluster.run_files import PARTIAL, STOP, read_run
from pipeline.cluster.script import SubmittedJob
from pipeline.cluster.status import State, judge


def command_of(
    job: SubmittedJob, config: LocalConfig | TorchrunConfig, python: str, ranks: int
) -> list[str]:
    """The words that run a job here.

    Args:
        job: What to run.
        config: How.
        python: Interpreter, unless the options name one.
        ranks: Of torchrun, unless the options say how many.
    """
    words = [config.python or python]
    if isinstance(config, TorchrunConfig) and job.has_ranks:
        words += ["-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        words += [f"--nproc-per-node={config.ranks_per_node or ranks}"]
    return [*words, "-m", job.module, *job.words]


def show(words: list[str], environment: Mapping[str, str]) -> str:
    """A command as one would type it."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, shlex.join(words)]) + "\n"


def run_here(
    job: SubmittedJob,
    config: LocalConfig | TorchrunConfig,
    words: list[str],
    environment: Mapping[str, str],
) -> int:
    """Runs a command to its end; returns the status of the run.

    Args:
        job: What it runs.
        config: How.
        words: The command.
        environment: All of it, the options' included.
    """
    sys.stdout.flush()
    started_at = time.time()
    process = subprocess.Popen(words, env=dict(environment))
    with _signals_for(process, job):
        status = process.wait()
    if status == 0 or job.output is None or isinstance(config, LocalConfig):
        return status if status >= 0 else 128 - status
    found = judge(read_run(job.output), time.time(), started_at=started_at)
    if found.state is State.refused and not found.files.has_work:
        return status if status > 0 else 128 - status
    sys.stdout.write("\n" + describe(found))
    return found.exit_status


@contextmanager
def _signals_for(process: subprocess.Popen[bytes], job: SubmittedJob) -> Iterator[None]:
    """Hands TERM on, and takes USR1 as a wish to stop; a Ctrl-C reaches the process by itself."""

    def forward(_number: int, _frame: FrameType | None) -> None:
        process.terminate()

    def ask(_number: int, _frame: FrameType | None) -> None:
        if job.output is not None:
            work = job.output.with_name(job.output.name + PARTIAL)
            if work.is_dir():
                (work / STOP).touch()

    handlers: dict[signal.Signals, Callable[..., None] | signal.Handlers] = {
        signal.SIGINT: signal.SIG_IGN,
        signal.SIGTERM: forward,
        signal.SIGUSR1: ask,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
