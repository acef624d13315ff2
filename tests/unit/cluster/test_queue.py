"""Handing a job to Slurm: the files that are written, what is said, what is refused at once."""

import time
from pathlib import Path

import pytest

from pipeline.cluster.queue import submit
from pipeline.cluster.script import SubmittedJob
from pipeline.errors import ClusterError, LayersweepError, OutputError
from tests.unit.cluster.scripts import PYTHON, make_config, make_job
from tests.unit.cluster.test_status import Recorded


@pytest.fixture
def job(tmp_path: Path) -> SubmittedJob:
    return make_job(directory=tmp_path, output=tmp_path / "o", words=("output=o",))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch, which notes its words and gives the number 42."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "sbatch"
    path.write_text(f'#!/bin/sh\necho "$PWD" "$@" > {tmp_path}/sbatch.calls\necho "42;cluster"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return path


@pytest.mark.usefixtures("sbatch")
def test_submitted_with_its_script_and_log_side_by_side(job: SubmittedJob, tmp_path: Path) -> None:
    told = submit(job, make_config(logs="logs of 100% mine"), PYTHON)
    logs = tmp_path / "logs of 100% mine"
    (script,) = logs.iterdir()
    assert script == logs / "layersweep-o-42.sh"
    assert f'--output="{tmp_path}/logs of 100%% mine/layersweep-o-%j.log"' in script.read_text()
    assert (tmp_path / "sbatch.calls").read_text().startswith(f"{tmp_path} --parsable {logs}")
    assert told == (
        "submitted: job 42\n"
        f"  script  {script}\n"
        f"  log     {logs}/layersweep-o-42.log\n"
        "  watch   squeue -j 42\n"
        f"          tail -F '{logs}/layersweep-o-42.log'\n"
        f"          layersweep-status {tmp_path}/o\n"
        f"  stop    touch {tmp_path}/o.partial/stop   # after the layer in hand\n"
        "          scancel --signal=USR1 --batch 42   # the same, and queued again\n"
        "          scancel 42   # at once\n"
    )


@pytest.mark.usefixtures("sbatch")
def test_a_job_of_which_nothing_is_kept_has_no_directory_to_watch(tmp_path: Path) -> None:
    told = submit(make_job(directory=tmp_path, output=None), make_config(), PYTHON)
    assert "layersweep-status" not in told
    assert told.endswith("  stop    scancel 42   # at once\n")


def test_what_sbatch_says_is_passed_on(job: SubmittedJob, sbatch: Path) -> None:
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: x' >&2\nexit 1\n")
    with pytest.raises(ClusterError, match="invalid partition: x"):
        submit(job, make_config(partition="x"), PYTHON)


def test_a_machine_without_sbatch(
    job: SubmittedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="login node"):
        submit(job, make_config(), PYTHON)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("sbatch")
def test_logs_that_cannot_be_written(job: SubmittedJob, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(ClusterError, match=r"cluster\.logs=DIR"):
        submit(job, make_config(logs="logs"), PYTHON)
    assert not (tmp_path / "sbatch.calls").exists()


@pytest.mark.usefixtures("sbatch")
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("finished", "it is there already"),
        ("rejected", "o.rejected is there"),
        ("foreign", "it is there already"),
    ],
)
def test_an_output_that_is_taken(
    state: str, message: str, job: SubmittedJob, tmp_path: Path
) -> None:
    recorded = Recorded(tmp_path / "o")
    if state == "foreign":
        recorded.output.mkdir()
        (recorded.output / "file").touch()
    else:
        recorded.publish(rejected=state == "rejected")
    with pytest.raises(OutputError, match=message) as refusal:
        submit(job, make_config(), PYTHON)
    assert isinstance(refusal.value, LayersweepError)
    assert not (tmp_path / "sbatch.calls").exists()


@pytest.mark.usefixtures("sbatch")
def test_a_run_that_is_still_at_work_is_announced(job: SubmittedJob, tmp_path: Path) -> None:
    """Not refused: the new job may be meant to wait for it (--dependency)."""
    Recorded(tmp_path / "o").began(time.time()).sign(0, updated=time.time())
    assert "another job works on the output" in submit(job, make_config(), PYTHON)


@pytest.mark.usefixtures("sbatch")
def test_a_run_that_goes_on_is_announced(job: SubmittedJob, tmp_path: Path) -> None:
    Recorded(tmp_path / "o").began(1.0).ended(2.0, "stopped", "SIGUSR1").commit(3)
    told = submit(job, make_config(), PYTHON)
    assert "goes on from an earlier attempt: 3 layers are committed" in told
