"""What the audit reads in the quantization configs beyond names and formats."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.source import Source
from tests.unit.checkpoint.tiny import edit_json, expect_problems


@pytest.fixture
def directory(mixed_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed_export, tmp_path / "copy"))


def in_quantization(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def in_config(config: dict[str, Any]) -> None:
        change(config["quantization_config"])

    return in_config


def first_group(config: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = next(iter(config["config_groups"].values()))
    return group


def swap_targets(config: dict[str, Any]) -> None:
    one, other = list(config["config_groups"].values())[:2]
    one["targets"], other["targets"] = other["targets"], one["targets"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: first_group(q)["weights"].update(num_bits=2), "does not describe"),
        (lambda q: first_group(q).pop("input_activations"), "does not describe"),
        (swap_targets, "does not describe"),
        (lambda q: q.pop("config_groups"), "config_groups is missing"),
        (lambda q: q["kv_cache_scheme"].update(dynamic=True), "kv_cache_scheme is dynamic"),
        (lambda q: q.update(group_size=32), "group_size is 32"),
    ],
)
def test_groups_that_describe_another_format(
    change: Callable[[dict[str, Any]], Any], message: str, directory: Path
) -> None:
    edit_json(directory / "config.json", in_quantization(change))
    expect_problems(directory, message)


@pytest.mark.parametrize(
    "entry", ["backbone.layers.1.mixer.experts.99.up_proj", "*.experts"], ids=["part", "glob"]
)
def test_ignore_entries_that_exclude_all_experts_of_a_layer(entry: str, directory: Path) -> None:
    edit_json(directory / "config.json", in_quantization(lambda q: q["ignore"].append(entry)))
    expect_problems(directory, "mixer.experts is quantized, and the ignore list excludes it")


@pytest.mark.parametrize("value", [5, [["deep"]], {"a": None}])
def test_malformed_configs_are_findings_not_crashes(value: Any, directory: Path) -> None:
    for change in (
        lambda q: q.update(ignore=value),
        lambda q: q.update(config_groups={"group_0": value}),
        lambda q: q.update(quantized_layers=value),
    ):
        copy = directory.with_name("again")
        shutil.copytree(directory, copy)
        edit_json(copy / "config.json", in_quantization(change))
        assert not audit(copy).ok
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("routed_scaling_factor", 9.5), ("layer_norm_epsilon", 1.0), ("new", 1)]
)
def test_config_differs_from_the_sources(
    key: str, value: Any, source: Source, directory: Path
) -> None:
    edit_json(directory / "config.json", lambda config: config.update({key: value}))
    result = audit(directory, source=source)
    assert any(f"config.json {key} differs from the source's" in p for p in result.problems)
