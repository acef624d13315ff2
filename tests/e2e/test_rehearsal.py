"""Rehearsals: random weights of a model's shape, and runs that write nothing but their report."""

from pathlib import Path
from typing import Any

import pytest

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.rehearsal import NOTE
from pipeline.config import Kernels
from pipeline.errors import ConfigError, OutputError
from pipeline.report.metrics import read_metrics
from pipeline.report.run_json import read_run_json
from tests.e2e.harness import (
    GOLDEN,
    golden_config,
    is_activation_scalar,
    read_checkpoint,
    run_job,
)
from tests.e2e.models import write_token_ids

SHAPES = {"demo": "demo", "golden": str(GOLDEN / "source" / "config.json")}
DISCARD = Path("discard")
SIZE = {"num_sequences": 4, "seq_len": 64, "loss_sequences": 1}
WEIGHT_ONLY = "nvfp4_weight_only"
REPORT = {"run.json", "metrics.jsonl", "config.yaml", "SHA256SUMS", NOTE}  # drawings are left out


def rehearse(output: Path, shape: str = "golden", **options: Any) -> Path:
    """Runs a job on random weights; the directory it made."""
    made_up: dict[str, Any] = {
        "checkpoint": "synthetic",
        "model": SHAPES[shape],
        "data": None,
        "calibration": SIZE,
        "unobserved_input_scale": 1.0,
        "allow_bad_loss": False,  # the loss of random weights is not judged
    }
    return run_job(output, **made_up | options)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of random weights, made by one rank."""
    root = tmp_path_factory.mktemp("published")
    return {shape: rehearse(root / shape, shape) for shape in SHAPES}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_random_weights_become_a_sound_checkpoint(shape: str, published: dict[str, Path]) -> None:
    assert audit(published[shape]).ok
    report = read_run_json(published[shape] / "layersweep" / "run.json")
    assert report.source == f"synthetic {SHAPES[shape]} (seed 0)"
    assert (report.loss, report.unigram_loss) == (None, None)
    assert "the weights are random" in report.warnings[0]
    assert not any("loss" in warning for warning in report.warnings[1:])


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_every_layout_sees_the_same_weights(
    shape: str, published: dict[str, Path], tmp_path: Path
) -> None:
    expected = read_checkpoint(published[shape])
    cut = read_checkpoint(rehearse(tmp_path / "out", shape, world=2, tp=2, ep=2))
    assert set(cut) == set(expected)
    for name, tensor in cut.items():
        if not is_activation_scalar(name):
            assert tensor == expected[name], name


def test_another_seed_is_another_model(published: dict[str, Path], tmp_path: Path) -> None:
    other = rehearse(tmp_path / "out", synthetic_seed=1, recipe=WEIGHT_ONLY)
    name = "backbone.layers.0.norm.weight"
    assert read_checkpoint(other)[name] != read_checkpoint(published["golden"])[name]


@pytest.mark.parametrize("world", [1, 2])
def test_a_rehearsal_leaves_its_report_alone(
    world: int, published: dict[str, Path], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    rehearse(DISCARD, world=world, report=str(report))
    assert {path.name for path in tmp_path.iterdir()} == {"report"}
    assert {path.name for path in report.iterdir()} == REPORT
    told = read_run_json(report / "run.json")
    assert told.output == "discard"
    assert "passed" not in told.audit
    assert told.audit["tensors"] == len(read_checkpoint(published["golden"]))
    assert "a rehearsal: no checkpoint was written" in told.warnings
    assert len([row for row in read_metrics(report / "metrics.jsonl") if "layer" in row])
    if world == 1:
        real = published["golden"] / "layersweep" / "SHA256SUMS"
        assert (report / "SHA256SUMS").read_text() == real.read_text()


def test_a_rehearsal_of_real_weights(tmp_path: Path) -> None:
    real = run_job(tmp_path / "out")
    report = tmp_path / "report"
    for _ in range(2):  # the second replaces the first one's report
        run_job(DISCARD, report=str(report))
        sums = (report / "SHA256SUMS").read_text()
        assert sums == (real / "layersweep" / "SHA256SUMS").read_text()
        assert read_run_json(report / "run.json").loss is not None


def test_without_a_forward_pass(tmp_path: Path) -> None:
    rehearse(DISCARD, recipe=WEIGHT_ONLY, report=str(tmp_path / "report"))
    assert {path.name for path in (tmp_path / "report").iterdir()} == REPORT


def test_given_token_ids_are_taken(tmp_path: Path) -> None:
    ids = write_token_ids(tmp_path / "ids.npy", 4, 64)
    rehearse(DISCARD, data=str(ids), report=str(tmp_path / "report"))


def refused(kind: type[Exception], message: str, **options: Any) -> None:
    config = golden_config(DISCARD, **{"recipe": WEIGHT_ONLY, **options})
    with pytest.raises(kind, match=message):
        calibrate(config, CONF_DIR, Place(), "")


def test_what_a_rehearsal_refuses(tmp_path: Path) -> None:
    made_up = {"checkpoint": "synthetic", "data": None}
    refused(ConfigError, "model: found nemotron9", **made_up, model="nemotron9")
    (tmp_path / "mine").touch()
    refused(
        OutputError,
        "report .*: found a directory with files in it",
        **made_up,
        model="demo",
        report=str(tmp_path),
    )
    refused(ConfigError, "kernels: found triton", **made_up, model="demo", kernels=Kernels.triton)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
