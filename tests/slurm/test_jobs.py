"""Whole jobs on a real Slurm of two nodes: to the end, stopped by hand, and out of time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.run_files import read_run
from pipeline.cluster.status import State, judge
from tests.slurm.jobs import ROOT, SlurmJob, Submitter, processes_of, published
from tests.slurm.private_slurm import PrivateSlurm

pytestmark = pytest.mark.slow

JOB = (
    *("cluster=slurm", "cluster.nodes=2"),
    *("checkpoint=demo", "data=demo", "output=out", "recipe=nvfp4_max", "device=cpu"),
    *("calibration.num_sequences=96", "calibration.seq_len=256", "evaluation.num_sequences=0"),
)


@pytest.fixture
def submitter(
    slurm: PrivateSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Submitter:
    return Submitter(slurm, tmp_path / "it's a place", monkeypatch, capfd)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test's checkpoint is left for the others to compare with."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def expected(undisturbed: Path) -> dict[str, bytes]:
    files = published(undisturbed / "out")
    if not files:
        pytest.skip("the test that makes the undisturbed checkpoint did not run")
    return files


def test_two_nodes_to_the_end(
    slurm: PrivateSlurm,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job = Submitter(slurm, undisturbed, monkeypatch, capfd)(*JOB)
    job.wait(lambda: job.committed or job.output.exists())
    status = judge(read_run(job.output), 0.0)
    assert status.state in (State.running, State.finished)
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert f"finished: {job.output}" in job.log
    report = json.loads((job.output / "layersweep" / "run.json").read_text())
    began = report["attempts"][0]
    assert (began["world"], began["slurm_job_id"]) == (2, job.number)
    done = subprocess.run(
        [sys.executable, "-m", "launch.verify", str(job.output), "source=pipeline/demo/model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.cluster
def test_told_to_stop_it_goes_on_by_itself(
    submitter: Submitter, expected: dict[str, bytes]
) -> None:
    job = submitter(*JOB)
    job.wait(lambda: job.committed)
    job.cancel("--signal=USR1", "--batch")
    job.wait(lambda: job.restarts == 1)
    assert "stopped after layer" in job.log
    assert "queued again" in job.log
    assert 0 < job.committed < 9
    assert judge(read_run(job.work), 0.0).state is State.stopped
    job.start_now()
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert published(job.output) == expected
    assert not job.work.exists()


@pytest.mark.cluster
def test_out_of_time_it_goes_on_by_itself(submitter: Submitter, expected: dict[str, bytes]) -> None:
    """Slurm may send its signal a minute early: any time from the start to the first minute."""
    job = submitter(*JOB, "cluster.time=0:02:00", "cluster.signal_seconds=60")
    job.wait(lambda: job.committed or "USR1" in job.log)
    _hold_until_the_signal(job)
    job.wait(lambda: job.restarts == 1)
    assert "USR1: stopping after the layer in hand" in job.log
    assert "queued again" in job.log
    job.start_now(TimeLimit="10")
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert published(job.output) == expected


def _hold_until_the_signal(job: SlurmJob) -> None:
    """The ranks stand still, as if their layer were a long one."""
    ranks = processes_of(job.directory, "launch.calibrate", but=["torch.distributed.run"])
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        job.wait(lambda: "USR1" in job.log)
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
