"""launch.plan's answer: known shapes, checkpoints, refusals as part of the answer, JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import CalibrationConfig, ParallelConfig, PlanConfig, PlanOutput
from pipeline.errors import ArchitectureError, ConfigError, LayoutError
from pipeline.planning import plan_of, show_plan
from tests.unit.checkpoint.tiny import tiny_config, tiny_tensors, write_source

CONF = Path(__file__).parents[2] / "conf"


def options(**changes: Any) -> PlanConfig:
    values: dict[str, Any] = {
        "recipe": "nvfp4_four_over_six",
        "calibration": CalibrationConfig(num_sequences=4, seq_len=64),
    }
    return PlanConfig(**values | changes)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = tiny_config()
    return write_source(tmp_path / "source", config, tiny_tensors(config))


def test_a_known_shape_and_its_config_file_give_the_same_plan() -> None:
    model = CONF.parent / "pipeline" / "demo" / "model"
    by_name = plan_of(options(model="demo"), CONF)
    assert by_name == plan_of(options(model=str(model)), CONF)
    assert by_name == plan_of(options(model=str(model / "config.json")), CONF)
    assert by_name.layers == {"mamba": 4, "attention": 1, "moe": 4, "mlp": 0}


def test_a_checkpoint_is_planned_with_the_dtypes_it_holds(checkpoint: Path) -> None:
    plan = plan_of(options(checkpoint=str(checkpoint)), CONF)
    assert plan.refusals == []
    config = checkpoint / "config.json"
    estimate = plan_of(options(model=str(config)), CONF)
    # The source holds A_log, D and dt_bias (two heads each, five Mamba layers) in FP32.
    assert plan.bf16_bytes - estimate.bf16_bytes == 5 * 3 * 2 * 2
    assert plan.parameters == estimate.parameters


def test_a_broken_source_is_a_refusal_beside_the_plan(checkpoint: Path) -> None:
    config = tiny_config()
    tensors = tiny_tensors(config)
    del tensors["backbone.layers.0.mixer.in_proj.weight"]
    write_source(checkpoint, config, tensors)
    plan = plan_of(options(checkpoint=str(checkpoint)), CONF)
    assert len(plan.refusals) == 1
    assert "backbone.layers.0.mixer.in_proj.weight" in plan.refusals[0]
    assert plan.effective_bits > 0
    assert show_plan(options(checkpoint=str(checkpoint)), CONF) == 2


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(options(model="nemotron9"), CONF)
    message = str(caught.value)
    assert message.startswith("model: found nemotron9; must be one of demo, nemotron3_nano, ")
    assert "for a checkpoint use checkpoint=DIR" in message


def test_a_config_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ArchitectureError, match="'llama'"):
        plan_of(options(model=str(tmp_path)), CONF)


def test_the_number_of_ranks_follows_the_degrees() -> None:
    for parallel, layout in (
        (ParallelConfig(), "world=1 (tp=1 dp=1; etp=1 ep=1 edp=1)"),
        (ParallelConfig(ep=8), "world=8 (tp=1 dp=8; etp=1 ep=8 edp=1)"),
        (ParallelConfig(tp=2), "world=2 (tp=2 dp=1; etp=1 ep=2 edp=1)"),
        (ParallelConfig(tp=2, world=8), "world=8 (tp=2 dp=4; etp=1 ep=8 edp=1)"),
    ):
        plan = plan_of(options(model="demo", parallel=parallel), CONF)
        assert plan.layout == layout
        assert len(plan.per_rank) == int(layout.split()[0].removeprefix("world="))
    with pytest.raises(LayoutError, match="world=2, tp=1, ep=3"):
        plan_of(options(model="demo", parallel=ParallelConfig(ep=3, world=2)), CONF)


def test_status_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    config = options(model="demo", output=PlanOutput.json)
    assert show_plan(config, CONF) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["refusals"] == []
    assert values["recipe"] == "nvfp4_four_over_six"
    config.parallel = ParallelConfig(tp=2)
    config.calibration = CalibrationConfig(seq_len=63)
    assert show_plan(config, CONF) == 2
    (refusal,) = json.loads(capsys.readouterr().out)["refusals"]
    assert refusal.endswith("use calibration.seq_len=62")


def test_what_cannot_be_planned_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    config = options(model="nemotron9", output=PlanOutput.json)
    assert show_plan(config, CONF) == 2
    (refusal,) = json.loads(capsys.readouterr().out)["refusals"]
    assert refusal.startswith("model: found nemotron9; ")


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_plan(options(model="demo"), CONF) == 0
    text = capsys.readouterr().out
    assert "recipe   nvfp4_four_over_six" in text
    assert "refused" not in text
