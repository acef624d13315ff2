"""What stands out in an evaluation: weights that are not their source's, layers that err too much.

In: the relative error of every quantized weight, and the layers' errors alone. Out: sentences that
name layer and tensor. The bounds of weights are facts about the formats (`checkpoint/audit_source`
derives them): Gaussian weights err by 0.08 to 0.10 in NVFP4 and by 0.026 in FP8; wrong scales, rows
or tensors by about 1. That a layer's output stands out is only a comparison with its like.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.evaluation.quantized import QuantizedCheckpoint
from pipeline.evaluation.records import LayerErrors

WEIGHT_BOUNDS: Mapping[str, float] = {"NVFP4": 0.2, "W4A16_NVFP4": 0.2, "FP8": 0.06}
STANDS_OUT = 3.0
"""Times the median of the layers of the same type and formats."""
FEWEST_LAYERS = 3
"""With less to compare with, nothing stands out."""
MOST_SHOWN = 10

Squares = Mapping[str, tuple[float, float]]
"""Squared error and squared weight by module."""


def relative_errors(parts: Sequence[Squares]) -> dict[str, float]:
    """Relative error of every quantized module, from all ranks' parts of it.

    Every element of a tensor is held by as many ranks as any other, so replicas cancel out.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        for module, (squared_error, squared_weight) in part.items():
            sums[module][0] += squared_error
            sums[module][1] += squared_weight
    return {module: _ratio(*pair) for module, pair in sums.items()}


def find_wrong_weights(errors: Mapping[str, float], checkpoint: QuantizedCheckpoint) -> list[str]:
    """One sentence for each weight that its format cannot explain, the worst first."""
    wrong = []
    for module, error in errors.items():
        algorithm = checkpoint.algorithms[module]
        if not error <= WEIGHT_BOUNDS[algorithm]:  # NaN is wrong too
            wrong.append((error, module, algorithm))
    wrong.sort(key=lambda item: (-item[0] if item[0] == item[0] else -math.inf, item[1]))
    found = [
        f"layer {module.split('.')[2]}: {module}.weight is {error:.4g} away from the source's "
        f"(relative); {algorithm} explains at most {WEIGHT_BOUNDS[algorithm]:g}"
        for error, module, algorithm in wrong[:MOST_SHOWN]
    ]
    if len(wrong) > MOST_SHOWN:
        layers = len({module.split(".")[2] for _, module, _ in wrong})
        found.append(f"{len(wrong)} such weights in {layers} layers in all")
    return found


def find_outlying_layers(
    layers: Sequence[LayerErrors], checkpoint: QuantizedCheckpoint, errors: Mapping[str, float]
) -> list[str]:
    """One sentence for each layer whose error alone is far above that of its like."""
    alike: dict[object, list[LayerErrors]] = defaultdict(list)
    for layer in layers:
        alike[layer.layer_type, checkpoint.layer_algorithms(layer.layer)].append(layer)
    found = []
    for group in alike.values():
        if len(group) < FEWEST_LAYERS:
            continue
        medians = {
            mode: statistics.median(layer.alone[mode] for layer in group) for mode in group[0].alone
        }
        for layer in group:
            # (Not: at most. An error that is no number stands out.)
            modes = [
                mode
                for mode, median in medians.items()
                if median > 0 and not layer.alone[mode] <= STANDS_OUT * median
            ]
            if modes:
                found.append((layer.layer, _describe(layer, modes, medians, checkpoint, errors)))
    return [text for _, text in sorted(found)]


def _describe(
    layer: LayerErrors,
    modes: list[str],
    medians: Mapping[str, float],
    checkpoint: QuantizedCheckpoint,
    errors: Mapping[str, float],
) -> str:
    prefix = f"backbone.layers.{layer.layer}."
    worst = max(
        ((error, module) for module, error in errors.items() if module.startswith(prefix)),
        default=(0.0, ""),
    )
    cause = "its weights are close to the source's: look at its input scales"
    if worst[1] and not worst[0] <= WEIGHT_BOUNDS[checkpoint.algorithms[worst[1]]]:
        cause = f"{worst[1]}.weight is {worst[0]:.4g} away from the source's"
    told = ", ".join(
        f"{mode} {layer.alone[mode]:.4g} (median {medians[mode]:.4g})" for mode in modes
    )
    return (
        f"layer {layer.layer} ({layer.layer_type}): its error alone is more than "
        f"{STANDS_OUT:g} times that of its like: {told}; {cause}"
    )


def _ratio(squared_error: float, squared_weight: float) -> float:
    if squared_weight == 0.0:
        return 0.0 if squared_error == 0.0 else math.inf
    return math.sqrt(squared_error / squared_weight)
