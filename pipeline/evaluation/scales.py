"""What a server knows about a layer's inputs: one static scale for each.

In: a layer's schedule and its chosen scalars. Out: format and scale by tap name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.nvfp4.formats import E2M1_MAX, E4M3_MAX, Format
from pipeline.schedule import EXPERT_PROJECTIONS, LayerSchedule, tap_of


@dataclass(frozen=True)
class InputScale:
    """How the inputs of a projection (or keys, or values) are quantized.

    Attributes:
        format: nvfp4 or fp8.
        scale: `input_scale`, `k_scale` or `v_scale`.
    """

    format: Format
    scale: float

    @property
    def amax(self) -> float:
        """The largest absolute value that the format then holds."""
        return self.scale * (E4M3_MAX * E2M1_MAX if self.format is Format.nvfp4 else E4M3_MAX)


LayerScales = Mapping[str, InputScale]
"""By tap name; an input that is not quantized is absent."""


def layer_scales(schedule: LayerSchedule, scalars: Mapping[str, float]) -> dict[str, InputScale]:
    """The scales of one layer.

    Args:
        schedule: What the layer's tensors become.
        scalars: `input_scale`, `k_scale`, `v_scale` by tensor name, as in the checkpoint.
    """
    found: dict[str, InputScale] = {}
    prefix = f"backbone.layers.{schedule.layer}.mixer"
    modules = {item.spec.module: item.module_format for item in schedule.dense}
    for projection in EXPERT_PROJECTIONS:
        if projection in schedule.experts:
            modules[f"{prefix}.experts.0.{projection}"] = schedule.experts[projection]
    for module, module_format in modules.items():
        scale = scalars.get(f"{module}.input_scale")
        if scale is not None and module_format.input_format is not None:
            found[tap_of(module)] = InputScale(module_format.input_format, scale)
    for tap, name in (("k_cache", "k_proj.k_scale"), ("v_cache", "v_proj.v_scale")):
        scale = scalars.get(f"{prefix}.{name}")
        if schedule.kv is not None and scale is not None:
            found[tap] = InputScale(Format.fp8, scale)
    return found
