"""What stands out in an evaluation: weights that are not their source's, layers that err too much.

In: how every weight differs from the source's, and the layers' errors alone. Out: sentences that
name layer and tensor. The bounds of weights are facts about the formats (`checkpoint/weight_errors`
derives them). That a layer's output stands out is only a comparison with its like.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.checkpoint.weight_errors import BOUNDS, WeightErrors
from pipeline.evaluation.quantized import QuantizedCheckpoint
from pipeline.evaluation.records import LayerErrors

STANDS_OUT = 3.0
"""Times the median of the layers of the same type and formats."""
FEWEST_LAYERS = 3
"""With less to compare with, nothing stands out."""
MOST_SHOWN = 10


def add_errors(parts: Sequence[Mapping[str, WeightErrors]]) -> dict[str, WeightErrors]:
    """Of every quantized module, from all ranks' parts of it; a replica counts once."""
    distinct: dict[str, dict[WeightErrors, None]] = defaultdict(dict)
    for part in parts:
        for module, errors in part.items():
            distinct[module][errors] = None
    return {module: sum(found, start=WeightErrors()) for module, found in distinct.items()}


def find_changed_copies(names: Sequence[str]) -> list[str]:
    """One sentence for each tensor that is not quantized, and not the source's."""
    found = [
        f"layer {name.split('.')[2]}: {name} is not quantized, and not the source's"
        for name in names[:MOST_SHOWN]
    ]
    if len(names) > MOST_SHOWN:
        found.append(f"{len(names)} such tensors in all")
    return found


def find_wrong_weights(
    errors: Mapping[str, WeightErrors], checkpoint: QuantizedCheckpoint
) -> list[str]:
    """One sentence for each weight that its format cannot explain, the worst first."""
    wrong = [
        (error.relative, module, fault)
        for module, error in errors.items()
        if (fault := error.fault(checkpoint.algorithms[module]))
    ]
    wrong.sort(key=lambda item: (-item[0] if item[0] == item[0] else -math.inf, item[1]))
    found = [
        f"layer {module.split('.')[2]}: {module}.weight {fault}"
        for _, module, fault in wrong[:MOST_SHOWN]
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
    if worst[1] and not worst[0] <= BOUNDS[checkpoint.algorithms[worst[1]]].whole:
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
