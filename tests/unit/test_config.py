"""Options: each number on its own, rules between fields, and what Hydra composes."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.calibration.data import DataSource
from pipeline.config import (
    CalibrateConfig,
    CalibrationConfig,
    ComputeDtype,
    EvaluationConfig,
    HiddenStorage,
    Kernels,
    ParallelConfig,
    PlanConfig,
    VerifyConfig,
    data_sources,
    read_yaml,
    register_schemas,
    to_dataclass,
    to_yaml,
)
from pipeline.errors import ConfigError, LayoutError

CONF = Path(__file__).parents[2] / "conf"


def composed(name: str, *overrides: str) -> Any:
    register_schemas(CONF)
    with initialize_config_dir(str(CONF / "job"), version_base=None):
        return to_dataclass(compose(name, list(overrides)))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("num_sequences", 0, 1),
        ("seq_len", 1, 2),
        ("micro_batch", 0, 1),
        ("micro_batch", -3, 1),
        ("loss_sequences", 0, 1),
    ],
)
def test_calibration_numbers_have_a_least_value(name: str, value: int, least: int) -> None:
    with pytest.raises(ConfigError) as caught:
        CalibrationConfig(**{name: value})
    assert str(caught.value).startswith(
        f"calibration.{name}: found {value}; must be at least {least}"
    )
    with pytest.raises(ConfigError, match=rf"calibration\.{name}: found {value}"):
        composed("calibrate", "checkpoint=x", "output=y", f"calibration.{name}={value}")
    assert getattr(CalibrationConfig(**{name: least}), name) == least


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("num_sequences", -1, 0), ("group_sequences", -1, 0), ("group_seq_len", 1, 2)],
)
def test_evaluation_numbers_have_a_least_value(name: str, value: int, least: int) -> None:
    message = rf"evaluation\.{name}: found {value}; must be at least {least}"
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**{name: value})
    with pytest.raises(ConfigError, match=message):
        composed("calibrate", "checkpoint=x", "output=y", f"evaluation.{name}={value}")
    assert getattr(EvaluationConfig(**{name: least}), name) == least


@pytest.mark.parametrize("name", ["max_kl", "min_top1", "max_perplexity_ratio"])
@pytest.mark.parametrize("value", [0.0, -0.1, float("nan")])
def test_gates_are_positive(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.{name}: found {value}; must be greater"):
        EvaluationConfig(**{name: value})


def test_a_share_of_positions_is_at_most_one() -> None:
    assert EvaluationConfig(min_top1=1.0).has_gates
    with pytest.raises(ConfigError, match=r"found 97\.0; must be greater than 0, at most 1\."):
        EvaluationConfig(min_top1=97.0)
    assert EvaluationConfig(max_kl=2.0, max_perplexity_ratio=3.0).has_gates
    assert not EvaluationConfig().has_gates


@pytest.mark.parametrize("gate", ["max_kl", "min_top1", "max_perplexity_ratio"])
def test_a_gate_needs_something_to_measure(gate: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.num_sequences: found 0; max_kl, min_top1"):
        EvaluationConfig(num_sequences=0, **{gate: 0.5})


def test_evaluation_composes() -> None:
    config = composed("calibrate", "checkpoint=a", "output=b", "evaluation.min_top1=0.97")
    assert config.evaluation == EvaluationConfig(min_top1=0.97)
    assert config.evaluation.num_sequences == 8
    assert composed("plan", "model=demo").evaluation == EvaluationConfig()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_replacement_scale_must_be_positive_and_finite(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"unobserved_input_scale: found .*positive finite"):
        CalibrateConfig(unobserved_input_scale=scale)
    assert CalibrateConfig(unobserved_input_scale=1e-3).unobserved_input_scale == 1e-3


POSITIVE = ["max_shard_gb", "timeout_minutes", "read_threads", "read_ahead_gb", "write_threads"]


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_sizes_and_times_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}: found {value}; must be positive"):
        CalibrateConfig(**{name: value})


def test_what_the_plan_chooses_is_left_open() -> None:
    config = composed("calibrate", "checkpoint=a", "output=b")
    assert config.calibration.micro_batch is None
    assert config.read_ahead_gb is None
    assert (config.kernels, config.hidden_store) == (Kernels.auto, HiddenStorage.auto)
    options = ("kernels=triton", "hidden_store=host", "read_ahead_gb=1.5", "read_threads=2")
    config = composed("calibrate", "checkpoint=a", "output=b", *options)
    assert (config.kernels, config.hidden_store) == (Kernels.triton, HiddenStorage.host)
    assert (config.read_ahead_gb, config.read_threads) == (1.5, 2)


def test_a_rehearsal_composes() -> None:
    config = composed("calibrate", "checkpoint=synthetic", "model=demo", "output=discard")
    assert config.is_synthetic
    assert config.discards_output
    assert config.report_directory == Path("layersweep-rehearsal")
    assert CalibrateConfig(output="discard", report="there").report_directory == Path("there")
    config = composed("calibrate", "checkpoint=demo", "output=out", "data=demo")
    assert not config.is_synthetic
    assert not config.discards_output
    assert config.report_directory == Path("out/layersweep")


REHEARSALS: dict[str, dict[str, Any]] = {
    "model: found nothing; checkpoint=synthetic makes": {"model": None},
    "model: found demo; the shape of a checkpoint is in": {"checkpoint": "demo"},
    "data: found demo; checkpoint=synthetic has no tokenizer": {"data": "demo"},
    r"data: found \['ids.npy'\]; checkpoint=synthetic": {"data": ["ids.npy"]},
    "report: found there; a checkpoint carries its report": {"output": "out", "report": "there"},
    "evaluation: found gates; what is measured on random": {
        "evaluation": EvaluationConfig(max_kl=0.1)
    },
}


@pytest.mark.parametrize("message", REHEARSALS)
def test_a_rehearsal_s_rules(message: str) -> None:
    options = {"checkpoint": "synthetic", "model": "demo", "output": "discard"}
    CalibrateConfig(**options, data="ids.npy", report="there")
    with pytest.raises(ConfigError, match=message):
        CalibrateConfig(**options | REHEARSALS[message])


def test_a_plan_needs_no_random_weights() -> None:
    with pytest.raises(ConfigError, match="checkpoint: found synthetic; a plan needs no weights"):
        PlanConfig(checkpoint="synthetic", model="demo")


@pytest.mark.parametrize("options", [{}, {"checkpoint": "a", "model": "b"}])
def test_a_plan_is_of_one_thing(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="exactly one of them says what to plan"):
        PlanConfig(**options)


@pytest.mark.parametrize(
    ("world", "experts", "etp", "ep"),
    [(1, 512, 1, 1), (8, 512, 1, 8), (6, 512, 1, 2), (8, 512, 2, 4), (7, 512, 1, 1), (4, 0, 1, 1)],
)
def test_the_largest_expert_degree_is_chosen(world: int, experts: int, etp: int, ep: int) -> None:
    dims = ParallelConfig(etp=etp).dims(world, experts)
    assert (dims.ep, dims.etp, dims.world) == (ep, etp, world)


@pytest.mark.parametrize("options", [{"tp": 0}, {"etp": 0}, {"etp": -2}, {"ep": 0}, {"ep": -1}])
def test_degrees_below_one_are_refused(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(LayoutError, match=rf"parallel\.{name}: found {options[name]}; "):
        ParallelConfig(**options).dims(4, 8)


def test_degrees_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(LayoutError, match="world=4, tp=3"):
        ParallelConfig(tp=3).dims(4, 8)
    with pytest.raises(LayoutError, match=r"world=4, tp=1, ep=3"):
        ParallelConfig(ep=3).dims(4, 9)
    with pytest.raises(LayoutError, match="etp=8"):
        ParallelConfig(etp=8).dims(4, 16)


def test_mandatory_options_are_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        composed("calibrate")
    message = str(caught.value)
    assert message.startswith("checkpoint, output: found nothing; these options are mandatory")
    assert message.endswith("checkpoint=... output=...")
    assert composed("verify").directory is None  # a word of its own on the command line


def test_commands_compose_to_dataclasses() -> None:
    config = composed(
        "calibrate", "checkpoint=a", "output=b", "parallel=tp2", "compute_dtype=float32"
    )
    assert isinstance(config, CalibrateConfig)
    assert isinstance(config.calibration, CalibrationConfig)
    assert (config.parallel.tp, config.compute_dtype) == (2, ComputeDtype.float32)
    assert isinstance(composed("plan", "model=nemotron3_nano"), PlanConfig)
    assert composed("verify", "directory=x", "hopper=true") == VerifyConfig(
        directory="x", hopper=True
    )
    demo = composed("calibrate", "experiment=demo", "output=elsewhere")
    assert (demo.checkpoint, demo.output, demo.calibration.seq_len) == ("demo", "elsewhere", 256)


def test_yaml_files_say_the_schemas_defaults() -> None:
    """The commented files and the dataclasses must not drift apart."""
    config = composed("calibrate", "checkpoint=a", "output=b")
    recipe = config.recipe
    assert config == CalibrateConfig(checkpoint="a", output="b", recipe=recipe)
    assert composed("plan", "model=m") == PlanConfig(model="m", recipe=recipe)


def test_the_saved_configuration_can_be_read_again(tmp_path: Path) -> None:
    register_schemas(CONF)
    with initialize_config_dir(str(CONF / "job"), version_base=None):
        text = to_yaml(compose("calibrate", ["checkpoint=a", "output=${checkpoint}-out"]))
    (tmp_path / "config.yaml").write_text(text)
    values = read_yaml(tmp_path / "config.yaml")
    assert values["output"] == "a-out"
    merged = OmegaConf.merge(OmegaConf.structured(CalibrateConfig), values)
    assert OmegaConf.to_object(merged).output == "a-out"  # type: ignore[union-attr]


def test_data_is_a_preset_a_path_or_a_list() -> None:
    presets = CONF / "data"
    assert data_sources("demo", presets) == [DataSource(path="demo", split="calibration")]
    assert len(data_sources("hub", presets)) == 4
    assert data_sources("text.jsonl", presets) == [DataSource(path="text.jsonl")]
    mixed = ["a.jsonl", {"path": "b.parquet", "weight": 2}]
    assert data_sources(mixed, presets) == [
        DataSource(path="a.jsonl"),
        DataSource(path="b.parquet", weight=2),
    ]
    assert data_sources({"path": "c", "split": "x"}, presets) == [DataSource(path="c", split="x")]


def test_a_preset_means_the_same_in_a_list() -> None:
    presets = CONF / "data"
    assert data_sources(["demo"], presets) == data_sources("demo", presets)


@pytest.mark.parametrize("data", [None, 7, [7], [{"split": "x"}], [{"path": "a", "wieght": 2}]])
def test_other_data_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        data_sources(data, CONF / "data")
    assert str(caught.value).startswith("data: found ")
    assert "a source is a path, or a mapping of path and ['name', 'split', 'weight']" in str(
        caught.value
    )
