"""How a job ends on a real Slurm, with a stand-in for the ranks that starts at once.

The batch script is ours, and so is the status that it asks for; only what runs under srun is a few
lines of shell that keep a run's records and obey the file stop.
"""

import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, SlurmJob, Submitter
from tests.slurm.private_slurm import PrivateSlurm

pytestmark = pytest.mark.slow

# On the first node: an attempt that works until it is told to stop, or dies at once without a word.
STAND_IN = """#!/bin/bash
case "$*" in *launch.status*) cd '{root}' && exec '{python}' "$@" ;; esac
work=$PWD/out.partial
mkdir -p "$work"
touch "$work/attempts.jsonl"
if [ "$SLURM_PROCID" = 0 ]; then
  number=$(($(grep -c began "$work/attempts.jsonl") + 1))
  rm -f "$work/stop"
  tell() {{
    printf '{{"attempt": %d, "time": %s, "event": "%s", "how": "%s", "why": "%s"}}\\n' \\
      "$number" "$(date +%s.%N)" "$@" >> "$work/attempts.jsonl"
  }}
  stop() {{ tell ended stopped "$1"; exit 1; }}
  trap 'stop SIGTERM' TERM
  tell began '' ''
  [ -e dies ] && kill -KILL $$
  until [ -e "$work/stop" ]; do sleep 0.1; done
  stop 'the file stop'
fi
until [ -e "$work/stop" ] || [ -e dies ]; do sleep 0.1; done
exit 1
"""
JOB = ("cluster.nodes=2", "cluster.python=./python", "checkpoint=x", "output=out", "data=x")


@pytest.fixture
def submitter(
    slurm: PrivateSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Submitter:
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(root=ROOT, python=sys.executable))
    python.chmod(0o755)
    return Submitter(slurm, tmp_path, monkeypatch, capfd)


def attempts(job: SlurmJob) -> int:
    path = job.work / "attempts.jsonl"
    return path.read_text().count('"began"') if path.exists() else 0


def test_the_file_stop_ends_it_for_good(submitter: Submitter) -> None:
    job = submitter(*JOB)
    job.wait(lambda: attempts(job) == 1)
    (job.work / "stop").touch()
    assert job.wait_for("FAILED", "PENDING") == "FAILED", job.log
    assert job.slurm.job(job.number)["ExitCode"] == "75:0"
    assert "not queued again: someone asked it to stop" in job.log


def test_scancel_ends_it_for_good(submitter: Submitter) -> None:
    job = submitter(*JOB)
    job.wait(lambda: attempts(job) == 1)
    job.cancel()
    job.wait(lambda: "not queued again: it was cancelled" in job.log)
    assert job.wait_for("CANCELLED") == "CANCELLED"
    assert job.restarts == 0
    assert "stopped: the same command goes on" in job.log


def test_usr1_queues_it_again_so_often_and_no_more(submitter: Submitter) -> None:
    job = submitter(*JOB, "cluster.max_restarts=1")
    job.wait(lambda: attempts(job) == 1)
    job.cancel("--signal=USR1", "--batch")
    job.wait(lambda: job.restarts == 1)
    job.start_now()
    job.wait(lambda: attempts(job) == 2)
    job.cancel("--signal=USR1", "--batch")
    assert job.wait_for("FAILED", "PENDING") == "FAILED", job.log
    assert "not queued again: cluster.max_restarts=1 is reached" in job.log


def test_preempted_it_is_queued_again(submitter: Submitter) -> None:
    """Slurm tells the ranks alone, and would take the end of the script for the job's."""
    job = submitter(*JOB, "cluster.directives=[--exclusive]")
    job.wait(lambda: attempts(job) == 1)
    urgent = job.slurm.command(
        *("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodes=2"),
        *("--output=/dev/null", "--wrap=true"),
    ).strip()
    job.wait(lambda: job.restarts == 1)
    assert "queued again: it goes on" in job.log
    SlurmJob(job.slurm, job.directory, urgent).wait_for("COMPLETED")
    job.start_now()
    job.wait(lambda: attempts(job) == 2)
    job.cancel()
    job.wait_for("CANCELLED")


def test_a_crash_is_queued_again_only_where_asked_for(submitter: Submitter) -> None:
    (submitter.directory / "dies").touch()
    job = submitter(*JOB)
    job.wait(lambda: attempts(job) == 1)
    assert job.wait_for("FAILED", "PENDING") == "FAILED", job.log
    assert job.slurm.job(job.number)["ExitCode"] == "4:0"
    assert "dead: its processes ended without a word" in job.log

    job = submitter(*JOB, "cluster.restart_after_crash=true", "cluster.max_restarts=1")
    job.wait(lambda: job.restarts == 1)
    job.start_now()
    job.wait(lambda: attempts(job) == 3)
    assert job.wait_for("FAILED", "PENDING") == "FAILED", job.log
    assert job.restarts == 1
    assert "not queued again: cluster.max_restarts=1 is reached" in job.log


def test_options_that_slurm_refuses_are_said(
    slurm: PrivateSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(AssertionError, match="invalid partition"):
        Submitter(slurm, tmp_path, monkeypatch, capfd)(*JOB, "cluster.partition=nowhere")
