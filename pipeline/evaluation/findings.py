"""What stands out in an evaluation: weights that are not their source's, layers that err too much.

In: how every weight differs from the source's, and the layers' errors alone. Out: sentences that
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

GAIN_BOUNDS: Mapping[str, float] = {"NVFP4": 0.04, "W4A16_NVFP4": 0.04, "FP8": 0.01}
"""How far `<quantized, source> / <source, source>` may be from 1. Rounding hardly moves it (at most
by 0.009 and 0.002 over the demo model's tensors), a wrong scale by as much as it is wrong."""

Squares = Mapping[str, tuple[float, ...]]
"""By module: squared error, squared weight, and the product of quantized and source weights."""


def relative_errors(parts: Sequence[Squares]) -> dict[str, float]:
    """Relative error of every quantized module, from all ranks' parts of it.

    Every element of a tensor is held by as many ranks as any other, so replicas cancel out.
    """
    return {module: _ratio(*sums[:2]) for module, sums in _add(parts).items()}


def find_wrong_scales(parts: Sequence[Squares], checkpoint: QuantizedCheckpoint) -> list[str]:
    """One sentence for each weight that is a multiple of the source's, the worst first."""
    wrong = []
    for module, (error, weight, product) in _add(parts).items():
        algorithm = checkpoint.algorithms[module]
        if not weight or _ratio(error, weight) > WEIGHT_BOUNDS[algorithm]:
            continue  # nothing to scale, or wrong anyway
        gain = product / weight
        if abs(gain - 1) > GAIN_BOUNDS[algorithm]:
            wrong.append((-abs(gain - 1), module, gain))
    found = [
        f"layer {module.split('.')[2]}: {module}.weight is {gain:.3f} times the source's: "
        "a scale is wrong"
        for _, module, gain in sorted(wrong)[:MOST_SHOWN]
    ]
    if len(wrong) > MOST_SHOWN:
        found.append(f"{len(wrong)} such weights in all")
    return found


def find_changed_copies(names: Sequence[str]) -> list[str]:
    """One sentence for each tensor that is not quantized, and not the source's."""
    found = [
        f"layer {name.split('.')[2]}: {name} is not quantized, and not the source's"
        for name in names[:MOST_SHOWN]
    ]
    if len(names) > MOST_SHOWN:
        found.append(f"{len(names)} such tensors in all")
    return found


def _add(parts: Sequence[Squares]) -> dict[str, list[float]]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for part in parts:
        for module, values in part.items():
            for index, value in enumerate(values):
                sums[module][index] += value
    return dict(sums)


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
        if len(group) < FEWEST_LAYERS and all(_is_finite(layer) for layer in group):
            continue
        medians = {
            mode: statistics.median(
                [layer.alone[mode] for layer in group if math.isfinite(layer.alone[mode])] or [0.0]
            )
            for mode in group[0].alone
        }
        for layer in group:
            # An error that is no number stands out.
            modes = [
                mode
                for mode, median in medians.items()
                if not math.isfinite(layer.alone[mode])
                or (len(group) >= FEWEST_LAYERS and layer.alone[mode] > STANDS_OUT * median > 0)
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
    cause = "look at its input scales"
    if worst[1] and not worst[0] <= WEIGHT_BOUNDS[checkpoint.algorithms[worst[1]]]:
        cause = f"{worst[1]}.weight is {worst[0]:.4g} away from the source's"
    told = ", ".join(
        f"{mode} {layer.alone[mode]:.4g} (median {medians[mode]:.4g})" for mode in modes
    )
    return (
        f"layer {layer.layer} ({layer.layer_type}): its error alone is more than "
        f"{STANDS_OUT:g} times that of its like: {told}; {cause}"
    )


def _is_finite(layer: LayerErrors) -> bool:
    return all(math.isfinite(error) for error in layer.alone.values())


def _ratio(squared_error: float, squared_weight: float) -> float:
    if squared_weight == 0.0:
        return 0.0 if squared_error == 0.0 else math.inf
    return math.sqrt(squared_error / squared_weight)
