"""Jobs on this machine: the command, the signals, and the exit status that the ranks meant."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster.foreground import command_of, run_here
from pipeline.cluster.options import JobName, LocalConfig, TorchrunConfig
from tests.unit.cluster.scripts import PYTHON, WORDS, make_job
from tests.unit.cluster.test_status import Recorded


def test_one_process_or_several() -> None:
    job, calibrate = make_job(), ["-m", "launch.calibrate", *WORDS]
    assert command_of(job, LocalConfig(), PYTHON, 1) == [PYTHON, *calibrate]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
    assert command_of(job, TorchrunConfig(), PYTHON, 4) == [
        *(PYTHON, *torchrun, "--nproc-per-node=4"),
        *calibrate,
    ]
    config = TorchrunConfig(ranks_per_node=2, python="other")
    assert command_of(job, config, PYTHON, 4)[0] == "other"
    assert "--nproc-per-node=2" in command_of(job, config, PYTHON, 4)


def test_an_audit_is_one_process_under_torchrun_too() -> None:
    job = make_job(name=JobName.verify, words=("DIR",), output=None)
    assert command_of(job, TorchrunConfig(), PYTHON, 4) == [PYTHON, "-m", "launch.verify", "DIR"]


@pytest.mark.parametrize(
    ("how", "status"),
    [("stopped", 75), ("refused", 2), ("failed", 4), ("", 4)],
)
def test_torchrun_exits_with_what_its_ranks_said(
    how: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recorded = Recorded(tmp_path / "o").began(time.time() + 60)
    if how:
        recorded.ended(time.time() + 70, how, "because")
    assert run(tmp_path, "exit 1") == status
    assert "attempt    1" in capfd.readouterr().out


@pytest.mark.parametrize("config", [LocalConfig(), TorchrunConfig()])
def test_a_start_that_never_began_keeps_its_own_status(
    config: LocalConfig | TorchrunConfig, tmp_path: Path
) -> None:
    assert run(tmp_path, "exit 3", config) == 3
    assert run(tmp_path, "kill -KILL $$", config) == 137


def test_a_job_that_ended_well_needs_no_files(tmp_path: Path) -> None:
    assert run(tmp_path, "exit 0") == 0


def test_variables_reach_the_process(tmp_path: Path) -> None:
    assert run(tmp_path, '[ "$A" = "b c" ] || exit 9', A="b c") == 0


def test_usr1_makes_the_file_and_term_is_handed_on(tmp_path: Path) -> None:
    """In a process of its own: signals go to a process."""
    words = stand_in(
        tmp_path,
        "trap 'exit 9' TERM; mkdir -p o.partial; touch ready\n"
        "until [ -e o.partial/stop ]; do sleep 0.05; done; touch asked\n"
        "while :; do sleep 0.05; done",
    )
    source = (
        "import os, sys; from pathlib import Path\n"
        "from pipeline.cluster.foreground import run_here\n"
        "from pipeline.cluster.options import JobName, LocalConfig\n"
        "from pipeline.cluster.script import SubmittedJob\n"
        "job = SubmittedJob(JobName.calibrate, (), Path.cwd(), Path.cwd() / 'o')\n"
        "sys.exit(run_here(job, LocalConfig(), [sys.argv[1]], os.environ))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", source, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    try:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGUSR1)
        wait_for(tmp_path / "asked")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 9
    finally:
        process.kill()


def run(
    folder: Path, body: str, config: LocalConfig | TorchrunConfig | None = None, **variables: str
) -> int:
    job = make_job(directory=folder, output=folder / "o")
    words = stand_in(folder, body)
    return run_here(job, config or TorchrunConfig(), words, {**os.environ, **variables})


def stand_in(folder: Path, body: str) -> list[str]:
    path = folder / "job"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return [str(path)]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)
