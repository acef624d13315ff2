"""Hands a job to Slurm: the script, the log beside it, what to type next.

In: a checked job and the options of its cluster. Out: text for the user. A dry run writes nothing.

submitit was considered, and is not used: it pickles a Python callable and writes a script around it
that starts one process per task. What is wanted here is the opposite: a script around torchrun that
an operator can read, keep and submit by hand, with its own answer to a time limit.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from pipeline.cluster.options import SlurmConfig
from pipeline.cluster.run_files import PARTIAL, STOP, read_run
from pipeline.cluster.script import SubmittedJob, host_output, log_file, render
from pipeline.cluster.status import State, judge
from pipeline.errors import ClusterError, OutputError

SBATCH_S = 120


def submit(job: SubmittedJob, config: SlurmConfig, python: str) -> str:
    """Writes the script and submits it; returns what the user should know.

    Raises:
        ConfigError: The options cannot work together.
        OutputError: The output is there already.
        ClusterError: There is no sbatch, or it refused.
    """
    script = render(job, config, python)
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ClusterError(
            "sbatch",
            value="no such command on this machine",
            rule="cluster=slurm submits with it",
            remedy="submit from a login node, or run here with cluster=torchrun; "
            "dry_run=true shows the script",
        )
    before = _look_at_output(job, config)
    log = log_file(job, config)
    folder = Path(str(log.parent).replace("%%", "%"))
    name = log.name.replace("%%", "%")
    path = folder / name.replace("-%j.log", time.strftime("-%Y%m%d-%H%M%S") + f"-{os.getpid()}.sh")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as problem:
        raise ClusterError(
            "cluster.logs",
            value=f"{folder} ({problem.strerror})",
            rule="the script and the log are written there",
            remedy="give cluster.logs=DIR that all nodes see and you may write to",
        ) from problem
    number = _call_sbatch(sbatch, path, job.directory)
    kept = folder / name.replace("%j.log", f"{number}.sh")
    path.rename(kept)  # Slurm has its own copy
    log = folder / name.replace("%j", number)
    return _tell(job, config, number, kept, log, before)


def _look_at_output(job: SubmittedJob, config: SlurmConfig) -> str:
    """Refuses what the job would only refuse on its nodes; says what it goes on from."""
    output = host_output(job, config)
    if output is None:
        return ""
    status = judge(read_run(output), time.time())
    taken = status.state in (State.finished, State.rejected)
    if taken or (output.is_dir() and any(output.iterdir())) or output.is_file():
        raise OutputError(
            f"output {output}",
            value=f"{output}.rejected is there"
            if status.state is State.rejected
            else "it is there already",
            rule="nothing is overwritten",
            remedy=f"see layersweep-status {shlex.quote(str(output))}; or choose another output",
        )
    if not status.files.has_work:
        return ""
    if status.state is State.running:
        return "another job works on the output: this one is refused if it starts before that ends"
    return f"goes on from an earlier attempt: {status.files.committed} layers are committed"


def _call_sbatch(sbatch: str, script: Path, directory: Path) -> str:
    """The job's number."""
    try:
        done = subprocess.run(
            [sbatch, "--parsable", str(script)],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=SBATCH_S,
        )
        problem = done.stderr.strip() or f"status {done.returncode}"
    except subprocess.TimeoutExpired:
        done, problem = None, f"no answer in {SBATCH_S} s"
    number = "" if done is None else done.stdout.strip().partition(";")[0]
    if done is None or done.returncode or not number.isdecimal():
        raise ClusterError(
            "sbatch",
            value=problem,
            rule="Slurm did not take the job",
            remedy=f"correct the options of cluster; the script is {script}",
        )
    return number


def _tell(
    job: SubmittedJob, config: SlurmConfig, number: str, script: Path, log: Path, before: str
) -> str:
    lines = [f"submitted: job {number}"]
    if before:
        lines.append(f"  {before}")
    lines += [f"  script  {script}", f"  log     {log}"]
    watch = [f"squeue -j {number}", f"tail -F {shlex.quote(str(log))}"]
    output = host_output(job, config)
    if output is not None:
        watch.append(f"layersweep-status {shlex.quote(str(output))}")
    lines += [f"  {'watch' if not index else '':<7} {text}" for index, text in enumerate(watch)]
    stop = []
    if output is not None:
        marker = shlex.quote(f"{output}{PARTIAL}/{STOP}")
        stop.append(f"touch {marker}   # after the layer in hand")
        if config.max_restarts:
            stop.append(f"scancel --signal=USR1 --batch {number}   # the same, and queued again")
    stop.append(f"scancel {number}   # at once")
    lines += [f"  {'stop' if not index else '':<7} {text}" for index, text in enumerate(stop)]
    return "\n".join(lines) + "\n"
