"""`layersweep-submit` as a user types it: which words it takes, what it refuses and shows."""

import sys
from pathlib import Path

import pytest

from launch import submit
from launch.submit import split_words
from pipeline.cluster.options import JobName

JOB = ("checkpoint=/models/X", "recipe=nvfp4_max", "data=/data/x.jsonl")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to submit from, without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/local/bin")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["layersweep-submit", *words])
    with pytest.raises(SystemExit) as end:
        submit.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["cluster=slurm", "cluster.nodes=2", "output=o"], ["cluster=slurm", "cluster.nodes=2"]),
        (["job=verify", "DIR", "source=cluster=x"], ["job=verify"]),
        (["dry_run=true", "+x=1", "~data", "parallel=tp2"], ["dry_run=true"]),
        (["--config-dir", "SITE", "-m", "output=o"], ["--config-dir", "SITE", "-m"]),
        (["--config-dir=SITE", "hydra.verbose=true"], ["--config-dir=SITE", "hydra.verbose=true"]),
        (["+cluster.x=1", "clusters=2", "jobs=1"], ["+cluster.x=1"]),
    ],
)
def test_words_of_the_command_and_of_the_job(words: list[str], own: list[str]) -> None:
    assert split_words(words) == (own, [word for word in words if word not in own])


def test_no_option_of_a_job_has_a_name_of_ours() -> None:
    for name in JobName:
        text = (submit.JOBS_DIR / f"{name.value}.yaml").read_text()
        names = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
        assert names & {"cluster", "job", "dry_run"} == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*JOB], "output"),
        ([*JOB, "output=o", "chekpoint=x"], "Could not override 'chekpoint'"),
        ([*JOB, "output=o", "calibration.seq_len=long"], "calibration.seq_len"),
        ([*JOB, "output=o", "recipe=nvfp4_maxx"], "did you mean nvfp4_max"),
        ([*JOB, "output=o", "word"], "missing EQUAL"),
        ([*JOB, "output=o", "cluster.nodes=3", "parallel.ep=16"], "world=24"),
        ([*JOB, "output=o", "cluster.node=3"], "cluster.node"),
        ([*JOB, "output=o", "cluster=local", "cluster.nodes=2"], "cluster.nodes"),
        ([*JOB, "output=o", "cluster.time=3600"], "a bare number is minutes"),
        ([*JOB, "output=o", "-m"], "one job is submitted at a time"),
        (
            ["checkpoint=synthetic", "model=nemotron4", "recipe=fp8", "output=discard"],
            "nemotron3_ultra",
        ),
        (["job=verify"], "the checkpoint to look at is mandatory"),
        (["job=evaluate", "DIR"], "source"),
        (["job=compare", "checkpoint=x", "recipes=[fp9,fp8]", "data=x"], "recipe: found fp9"),
        ([*JOB, "output=o"], "no such command on this machine"),
    ],
)
def test_refused_before_anything_is_queued(
    words: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *words) == 2
    assert message in capfd.readouterr().err
    assert list(place.iterdir()) == []


def test_dry_run_shows_the_script_and_does_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["dry_run=true", "cluster.nodes=2", "cluster.time=4:00:00", *JOB, "output=a/b"]
    assert run(monkeypatch, *words) == 0
    script = capfd.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert f"output={place}/a/b\n" in script
    assert "  output=a/b\n" in script  # the job has it as it was given, in the same directory
    assert f"cd -- {place} " in script
    assert sys.executable in script
    assert list(place.iterdir()) == []


def test_a_sites_own_file_extends_ours(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = place / "site" / "cluster"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        'defaults: [slurm, _self_]\npartition: batch\ntime: "2:00:00"\nsetup: [module load x]\n'
    )
    words = ["--config-dir", str(place / "site"), "cluster=mine", "cluster.nodes=2"]
    assert run(monkeypatch, *words, "dry_run=true", *JOB, "output=o") == 0
    script = capfd.readouterr().out
    for line in ("#SBATCH --partition=batch", "#SBATCH --time=2:00:00", "module load x"):
        assert line in script.splitlines()
    assert "#SBATCH --nodes=2" in script


def test_dry_run_of_torchrun_shows_the_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["cluster=torchrun", "cluster.ranks_per_node=2", "+cluster.environment.A=b c"]
    assert run(monkeypatch, *options, "dry_run=true", *JOB, "output=o p") == 0
    assert capfd.readouterr().out == (
        f"A='b c' {sys.executable} -m torch.distributed.run --standalone --max-restarts=0 "
        f"--nproc-per-node=2 -m launch.calibrate {' '.join(JOB)} 'output=o p'\n"
    )
