"""Choosing scales from reduced statistics.

In: amax of whole logical tensors (already reduced), squared errors of candidates, input amax.
Out: the amax that each quantized tensor is scaled by, and the activation scalars of a layer.
Every rank computes the same from the same numbers.
"""

from __future__ import annotations

import torch

from pipeline.errors import NumericsError
from pipeline.nvfp4.formats import Format
from pipeline.nvfp4.reference import input_scale, kv_scale
from pipeline.recipe import ModuleFormat
from pipeline.schedule import EXPERT_PROJECTIONS, LayerSchedule, tap_of


def choose_fp8_amax(
    amax: torch.Tensor, squared_errors: torch.Tensor, multipliers: tuple[float, ...]
) -> torch.Tensor:
    """Amax of FP8 tensors under `mse` with multipliers (NUMERICS: FP8).

    Args:
        amax: fp32 [n], of the whole tensors.
        squared_errors: fp64 [n, T], of the whole tensors under each multiplier.
        multipliers: T candidates; the first of equals wins.

    Returns:
        fp32 [n]: `amax * t` with the least squared error.
    """
    if not multipliers:
        return amax
    best = squared_errors.argmin(dim=-1)  # argmin gives the first of equals
    return amax * torch.tensor(multipliers, dtype=torch.float32, device=amax.device)[best]


def choose_scalars(
    schedule: LayerSchedule,
    amax: dict[str, torch.Tensor],
    experts: int,
    *,
    clamp_kv_scales: bool,
    unobserved_input_scale: float | None,
) -> dict[str, float]:
    """The activation scalars of one layer: `input_scale`, `k_scale`, `v_scale` by tensor name.

    Args:
        schedule: What the layer's tensors become.
        amax: Reduced amax of each observed tap, fp32 [1].
        experts: Number of routed experts; all share one value per projection.
        clamp_kv_scales: Whether a KV scale is never below 1.0.
        unobserved_input_scale: Scale of a projection that saw nothing but zeros; None refuses it.

    Raises:
        NumericsError: A projection saw only zeros, or no token.
    """

    def scale_of(module: str, module_format: ModuleFormat) -> float | None:
        if module_format.input_format is None or module_format.input_format is Format.bf16:
            return None
        if not module_format.needs_input_amax:
            observed = torch.tensor([module_format.constant_input_amax], dtype=torch.float32)
        else:
            observed = amax[tap_of(module)]
            if float(observed) == 0.0:
                return _unobserved(module, unobserved_input_scale)
        return float(input_scale(observed, module_format.input_format, module))

    scalars: dict[str, float] = {}
    prefix = f"backbone.layers.{schedule.layer}.mixer"
    for item in schedule.dense:
        value = scale_of(item.spec.module, item.module_format)
        if value is not None:
            scalars[f"{item.spec.module}.input_scale"] = value
    for projection in EXPERT_PROJECTIONS:
        if projection in schedule.experts:
            module = f"{prefix}.experts.0.{projection}"
            value = scale_of(module, schedule.experts[projection])
            if value is not None:
                for expert in range(experts):
                    scalars[f"{prefix}.experts.{expert}.{projection}.input_scale"] = value
    if schedule.kv is not None:
        for tap, name in (("k_cache", "k_proj.k_scale"), ("v_cache", "v_proj.v_scale")):
            constant = schedule.kv.constant_amax
            observed = amax[tap] if constant is None else torch.tensor([constant])
            full = f"{prefix}.{name}"
            if float(observed) == 0.0:
                scalars[full] = _unobserved(full, unobserved_input_scale)
            else:
                scalars[full] = float(kv_scale(observed.float(), clamp_kv_scales, full))
    return scalars


def _unobserved(module: str, replacement: float | None) -> float:
    if replacement is None:
        raise NumericsError(
            f"{module} input amax",
            value=0.0,
            rule="a projection that saw no token, or only zeros, has no input scale",
            remedy="calibrate on more or other text, or give unobserved_input_scale=VALUE",
        )
    return replacement
