"""What stands out: wrong weights by their error, layers by comparison with their like."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest

from pipeline.checkpoint.weight_errors import Part, WeightErrors
from pipeline.evaluation.findings import (
    add_errors,
    find_outlying_layers,
    find_wrong_weights,
)
from pipeline.evaluation.quantized import QuantizedCheckpoint
from pipeline.evaluation.records import LayerErrors


@dataclass
class Stand:
    """The part of a checkpoint that findings look at."""

    algorithms: Mapping[str, str]
    by_layer: Mapping[int, Any]

    def layer_algorithms(self, layer: int) -> Any:
        return self.by_layer.get(layer, ("NVFP4",))


def checkpoint(algorithms: Mapping[str, str], by_layer: Any = None) -> QuantizedCheckpoint:
    return cast(QuantizedCheckpoint, Stand(algorithms, by_layer or {}))


def module(layer: int, name: str = "experts.0.up_proj") -> str:
    return f"backbone.layers.{layer}.mixer.{name}"


def layers(*errors: float, kind: str = "moe") -> list[LayerErrors]:
    return [
        LayerErrors(layer=i, layer_type=kind, accumulated={"w4a4": 1.0}, alone={"w4a4": error})
        for i, error in enumerate(errors)
    ]


def erring(error: float) -> WeightErrors:
    """Of a tensor with this relative error and no other fault."""
    return WeightErrors(error**2, 1.0, 1.0)


def test_parts_of_all_ranks_add_up_and_replicas_count_once() -> None:
    worse, worst = Part(1.5, row=3), Part(2.0, row=7, column=32, width=16)
    one = {"a": WeightErrors(1.0, 50.0, row=worse), "b": WeightErrors()}
    two = {"a": WeightErrors(3.0, 350.0, block=worst), "c": WeightErrors(2.0, 0.0)}
    once = add_errors([one, two])
    assert once["a"] == WeightErrors(4.0, 400.0, row=worse, block=worst)
    assert {name: error.relative for name, error in once.items()} == {
        "a": 0.1,
        "b": 0.0,
        "c": math.inf,
    }
    assert add_errors([one, two, one, two]) == once


@pytest.mark.parametrize(
    ("algorithm", "error", "is_wrong"),
    [
        ("NVFP4", 0.2, False),
        ("NVFP4", 0.201, True),
        ("W4A16_NVFP4", 0.19, False),
        ("W4A16_NVFP4", 0.3, True),
        ("FP8", 0.06, False),
        ("FP8", 0.07, True),
        ("FP8", math.nan, True),
        ("NVFP4", math.inf, True),
    ],
)
def test_bounds_of_weights(algorithm: str, error: float, is_wrong: bool) -> None:
    found = find_wrong_weights({module(7): erring(error)}, checkpoint({module(7): algorithm}))
    assert bool(found) is is_wrong
    if is_wrong:
        assert found[0].startswith(f"layer 7: {module(7)}.weight is ")
        assert algorithm in found[0]


def test_many_wrong_weights_are_counted_the_worst_first() -> None:
    errors = {
        module(layer, f"experts.{e}.up_proj"): erring(1.0 + e) for layer in (1, 4) for e in range(8)
    }
    errors[module(9)] = erring(math.nan)
    found = find_wrong_weights(errors, checkpoint(dict.fromkeys(errors, "NVFP4")))
    assert found[0].startswith("layer 9: ")
    assert "experts.7.up_proj.weight is 8 away" in found[1]
    assert found[10:] == ["17 such weights in 3 layers in all"]


def test_a_layer_stands_out_against_its_like() -> None:
    ordinary = checkpoint({module(i): "NVFP4" for i in range(5)})
    assert find_outlying_layers(layers(0.1, 0.1, 0.29, 0.1), ordinary, {}) == []
    errors = {module(2): 0.09, module(3): 0.5}
    (found,) = find_outlying_layers(layers(0.1, 0.1, 0.4, 0.1), ordinary, errors)
    assert found.startswith("layer 2 (moe): ")
    assert "w4a4 0.4 (median 0.1)" in found
    assert "look at its input scales" in found
    (found,) = find_outlying_layers(layers(0.1, 0.1, 0.1, math.nan), ordinary, errors)
    assert found.endswith(f"{module(3)}.weight is 0.5 away from the source's")


def test_layers_are_compared_with_those_of_their_formats_only() -> None:
    formats = {0: ("FP8",), 1: ("FP8",), 2: ("FP8",), 3: ("NVFP4",), 4: ()}
    mixed = checkpoint({}, formats)
    assert find_outlying_layers(layers(0.01, 0.01, 0.01, 0.1, 0.0), mixed, {}) == []
    unquantized = checkpoint({}, dict.fromkeys(range(4), ()))
    assert find_outlying_layers(layers(0.0, 0.0, 0.0, 0.0), unquantized, {}) == []
    few = checkpoint({})
    assert find_outlying_layers(layers(0.01, 0.9), few, {}) == []
