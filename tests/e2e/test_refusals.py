"""Degrees, recipes and command lines that are refused before the sweep."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.config import Device
from pipeline.errors import (
    ConfigError,
    LayersweepError,
    LayoutError,
    RecipeError,
)
from tests.e2e.harness import golden_config
from tests.e2e.models import (
    write_checkpoint,
)
from tests.e2e.refusals import EVERYTHING, EXPERT, SIZE, refuse, write_recipe

ROOT = Path(__file__).parents[2]


# --- layouts


def test_k_is_not_a_multiple_of_16_after_sharding_by_tp(source: Path) -> None:
    refuse(
        LayoutError,
        source,
        world=2,
        tp=2,
        recipe=EVERYTHING,
        what="backbone.layers.1.mixer.shared_experts.down_proj.weight",
        value="K=48 / tp=2 = 24",
        rule="multiple of 16",
        remedy="parallel.tp <= 1",
    )


def test_k_is_not_a_multiple_of_16_after_sharding_by_etp(source: Path) -> None:
    refuse(
        LayoutError,
        source,
        world=4,
        etp=4,
        recipe=EVERYTHING,
        what=f"{EXPERT}.0.down_proj.weight",
        value="K=32 / etp=4 = 8",
        rule="multiple of 16",
        remedy="parallel.etp <= 2",
    )


def test_k_is_not_a_multiple_of_16_at_all(tmp_path: Path) -> None:
    refuse(
        RecipeError,
        write_checkpoint(tmp_path / "source", moe_intermediate_size=40),
        what=f"{EXPERT}.0.down_proj.weight",
        value="K=40",
        rule="multiple of 16",
        remedy="*down_proj*",
    )


def test_several_refusals_come_together(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    config = golden_config(
        tmp_path / "out",
        checkpoint=str(source),
        recipe=EVERYTHING,
        tp=2,
        calibration={**SIZE, "seq_len": 31},
    )
    with pytest.raises(LayersweepError, match="2 reasons not to start") as caught:
        calibrate(config, CONF_DIR, Place(0, 2, 0), "")
    assert "K=48 / tp=2 = 24" in str(caught.value)
    assert "calibration.seq_len=30" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("world", "degrees", "what", "value", "rule"),
    [
        (4, {"tp": 3}, "parallel degrees", "world=4, tp=3", "world = tp * dp = 3 * dp"),
        (4, {"ep": 3}, "parallel degrees", "ep=3", "world = etp * ep * edp = 1 * 3 * edp"),
        (2, {"tp": 4}, "parallel degrees", "world=2, tp=4", "in whole numbers"),
        (2, {"tp": 0}, "parallel.tp", "0", "at least 1"),
        (2, {"ep": 0}, "parallel.ep", "0", "at least 1"),
        (2, {"etp": 0}, "parallel.etp", "0", "at least 1"),
        (3, {"ep": 3}, "parallel.ep", "3", "must divide n_routed_experts=8"),
        (16, {"ep": 16}, "parallel.ep", "16", "must divide n_routed_experts=8"),
        (3, {"etp": 3}, "parallel.etp", "3", "must divide moe_intermediate_size=32"),
    ],
)
def test_degrees_that_do_not_divide(
    world: int, degrees: dict[str, int], what: str, value: str, rule: str, source: Path
) -> None:
    options = {"ep": 1, **degrees} if "ep" not in degrees else degrees
    refuse(LayoutError, source, world=world, what=what, value=value, rule=rule, **options)


@pytest.mark.parametrize(
    ("pattern", "tp", "rule"),
    [
        ("M", 16, "must divide mamba_num_heads=8"),
        ("MM", 3, "must divide mamba_num_heads=8"),
        ("**", 8, "must divide num_attention_heads=4"),
        ("-", 3, "must divide"),
        ("E", 5, "must divide moe_shared_expert_intermediate_size=48"),
    ],
)
def test_more_ranks_than_the_layers_can_be_cut_into(
    pattern: str, tp: int, rule: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", hybrid_override_pattern=pattern)
    config = golden_config(
        tmp_path / "out",
        checkpoint=str(source),
        recipe="fp8",
        tp=tp,
        ep=1,
        calibration={**SIZE, "seq_len": 240},
    )
    with pytest.raises(LayersweepError) as caught:
        calibrate(config, CONF_DIR, Place(0, tp, 0), "")
    assert f"parallel.tp: found {tp}; {rule}" in str(caught.value)
    assert "choose another degree" in str(caught.value)


def test_key_value_heads_that_cannot_be_shared_evenly(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "source",
        hybrid_override_pattern="*",
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    refuse(
        LayoutError,
        source,
        world=3,
        tp=3,
        recipe="fp8",
        calibration={**SIZE, "seq_len": 30},
        what="parallel.tp",
        value="3",
        rule="num_key_value_heads=4 or be a multiple",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="has GPUs")
def test_more_ranks_than_gpus(source: Path) -> None:
    refuse(
        ConfigError,
        source,
        device=Device.cuda,
        what="device",
        value="0 GPUs for local rank 0",
        rule="GPU of its own",
        remedy="device=cpu",
    )


# --- recipes


def test_enabled_format_that_ends_on_no_tensor(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", hybrid_override_pattern="M*")
    refuse(
        RecipeError,
        source,
        recipe="nvfp4_four_over_six",
        what="'*mixer.experts.*weight_quantizer'",
        value="ends on no tensor of this model",
        rule="must be used",
        remedy="check the pattern",
    )


def test_enabled_format_that_a_later_entry_switches_off(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "quantizer_name: '*.mixer.in_proj*weight_quantizer', cfg: {$import: fp8}",
        "quantizer_name: '*.mixer.in_proj*input_quantizer', cfg: {$import: fp8}",
        "quantizer_name: '*.mixer.up_proj*weight_quantizer', cfg: {$import: nvfp4}",
        "quantizer_name: '*.mixer.up_proj*', enable: false",
    )
    refuse(
        RecipeError,
        source,
        recipe=recipe,
        what="'*.mixer.up_proj*weight_quantizer'",
        value="no tensor",
    )


def test_recipe_that_switches_everything_off(source: Path, tmp_path: Path) -> None:
    refuse(RecipeError, source, recipe=write_recipe(tmp_path), value="no weight and no KV cache")


def test_experts_of_one_layer_with_two_formats(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "quantizer_name: '*mixer.experts.*weight_quantizer*', cfg: {$import: nvfp4}",
        "quantizer_name: '*mixer.experts.down_proj*_quantizer*', cfg: {$import: fp8}",
    )
    error = refuse(
        RecipeError,
        source,
        recipe=recipe,
        what="routed experts of layer 1",
        rule="all experts of a layer must have one format",
        remedy="patterns",
    )
    assert "NVFP4" in str(error)
    assert "FP8" in str(error)


def test_one_expert_with_another_format(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "quantizer_name: '*mixer.experts.*weight_quantizer*', cfg: {$import: nvfp4}",
        "quantizer_name: '*layers.5.mixer.experts.*_weight_quantizers.3', enable: false",
    )
    refuse(
        RecipeError,
        source,
        recipe=recipe,
        what="routed experts of layer 5",
        value="BF16 for up_proj/down_proj of experts 3",
        rule="one format",
    )


def test_unknown_recipe(source: Path) -> None:
    refuse(RecipeError, source, recipe="nvfp4_four_over_sex", value="nvfp4_four_over_sex")


# --- the command line


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """Takes back what the command does to the loggers of this process."""
    loggers = [logging.getLogger(name) for name in (None, "pipeline", "launch")]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nonsense=1"], 2, "Could not override 'nonsense'"),
        (["calibration.seq_length=3"], 2, "Key 'seq_length' not in 'CalibrationConfig'"),
        (["parallel.tp=two"], 2, "Value 'two' of type 'str' could not be converted to Integer"),
        (
            ["checkpoint=demo", "output=out", "calibration.seq_len=0"],
            2,
            "calibration.seq_len: found 0; must be at least 2",
        ),
        ([], 2, "checkpoint, output: found nothing; these options are mandatory"),
        (["checkpoint=/nowhere/at/all", "output=out"], 2, "found no such directory"),
    ],
    ids=["option", "nested-option", "type", "range", "mandatory", "source"],
)
@pytest.mark.usefixtures("_logging_as_before")
def test_command_line(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from launch.calibrate import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["layersweep-calibrate", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capfd.readouterr().err
    assert caught.value.code == status, said
    assert message in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
