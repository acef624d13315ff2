"""From Model Optimizer's quantizer attributes to a format, or to the name of what is refused.

In: attributes and the algorithm. Out: `QuantizerFormat`, `ModuleFormat`, `KVFormat`. A pair of
attributes and algorithm is accepted only where the exported bytes are known to be Model
Optimizer's (0.47: `model_calib.py`, `calib/mse.py`, `nn/modules/tensor_quantizer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.nvfp4.formats import BLOCK_SIZE, E4M3_MAX, Format, WeightMethod
from pipeline.recipe.records import Algorithm, Attributes, KVFormat, ModuleFormat

SUPPORTED = (
    "supported are NVFP4 weights in blocks of 16 (W4A4 or weight-only) by max, four-over-six or "
    "the E4M3 sweep, FP8 E4M3 per tensor (weights and inputs) by max or multipliers, an FP8 KV "
    "cache, and BF16"
)
"""Closes every refusal of a format or an algorithm."""

# What Model Optimizer's nvfp4_four_over_six.yaml is published with: amax mapped to 6, or to 4.
_FOUR_OVER_SIX_MULTIPLIERS = (1.0, 1.5)
_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)
# An amax below this has a scale that fp32 can only hold as a subnormal number.
LEAST_AMAX = 1e-30
_READ = {"num_bits", "block_sizes", "use_constant_amax", "constant_amax"}
_BASE_NAMES = {(2, 1): "FP4", (4, 3): "FP8", (5, 2): "FP8 E5M2", (3, 2): "FP6", (2, 3): "FP6"}


class RefusedFormat(Exception):
    """What is asked for and not supported; the caller adds recipe, entry and module."""

    def __init__(self, asked: str, remedy: str = "") -> None:
        super().__init__(asked)
        self.asked, self.remedy = asked, remedy


@dataclass(frozen=True)
class QuantizerFormat:
    """The format of one enabled quantizer.

    Attributes:
        format: NVFP4 or FP8.
        scaling: NVFP4 block scales: `static`, `dynamic` or `four_over_six`; empty for FP8.
        constant_amax: The amax where the recipe fixes it.
    """

    format: Format
    scaling: str = ""
    constant_amax: float | None = None


def read_quantizer(quantizers: Sequence[Attributes]) -> QuantizerFormat:
    """Reads an enabled quantizer; an empty sequence is one that no entry configured.

    Raises:
        RefusedFormat: Anything but NVFP4 in blocks of 16 and FP8 E4M3 per tensor.
    """
    if not quantizers:
        raise RefusedFormat(
            "INT8 (Model Optimizer's default for a quantizer that no entry configures)",
            "begin quant_cfg with {quantizer_name: '*', enable: false}",
        )
    if len(quantizers) > 1:
        parts = ", then ".join(describe(attributes) for attributes in quantizers)
        raise RefusedFormat(f"quantizers in sequence ({parts})")
    attributes = quantizers[0]
    if set(attributes) - _READ:
        raise RefusedFormat(describe(attributes))
    constant = attributes.get("constant_amax")
    if constant is not None and not LEAST_AMAX <= float(constant) < math.inf:
        raise RefusedFormat(
            f"a constant amax of {constant}", "give a positive finite one; fp32 holds its scale"
        )
    if attributes.get("use_constant_amax"):
        constant = float(E4M3_MAX)  # tensor_quantizer.py, _get_amax
    blocks = attributes.get("block_sizes")
    bits = _tuple(attributes["num_bits"])
    if blocks is None and bits == _E4M3:
        return QuantizerFormat(Format.fp8, constant_amax=constant)
    scaling = _nvfp4_scaling(blocks) if blocks is not None and bits == _E2M1 else None
    if scaling is None:
        raise RefusedFormat(describe(attributes))
    return QuantizerFormat(Format.nvfp4, scaling, constant)


def _nvfp4_scaling(blocks: Mapping[int | str, object]) -> str | None:
    known = {-1, "type", "scale_bits", "four_over_six"}
    if set(blocks) - known or blocks.get(-1) != BLOCK_SIZE:
        return None
    if _tuple(blocks.get("scale_bits")) != _E4M3:
        return None
    scaling = str(blocks.get("type") or "static")
    if not blocks.get("four_over_six"):
        return scaling
    return "four_over_six" if scaling == "static" else None


def module_format(
    weight: QuantizerFormat | None, inputs: QuantizerFormat | None, algorithm: Algorithm
) -> ModuleFormat:
    """The format of a projection; None is a quantizer that is off.

    Raises:
        RefusedFormat: A pair, or a weight under this algorithm, that is not supported.
    """
    if weight is None:
        if inputs is not None:
            raise RefusedFormat(
                f"{_name(inputs)} inputs with BF16 weights", "enable both quantizers or neither"
            )
        return ModuleFormat(Format.bf16)
    if weight.constant_amax is not None:
        raise RefusedFormat("a constant amax for a weight")
    if inputs is None:
        if weight.format is not Format.nvfp4:
            raise RefusedFormat(
                "FP8 weights with BF16 inputs (W8A16)", "enable the input quantizer in FP8 as well"
            )
    elif inputs.format is not weight.format:
        raise RefusedFormat(f"{_name(weight)} weights with {_name(inputs)} inputs")
    elif inputs.scaling not in ("", "dynamic"):
        raise RefusedFormat(
            f"NVFP4 inputs with {inputs.scaling} block scales", "use block_sizes.type: dynamic"
        )
    is_nvfp4 = weight.format is Format.nvfp4
    return ModuleFormat(
        weight_format=weight.format,
        weight_method=_weight_method(weight.scaling, algorithm) if is_nvfp4 else None,
        fp8_multipliers=() if is_nvfp4 else algorithm.multipliers,
        input_format=None if inputs is None else inputs.format,
        constant_input_amax=None if inputs is None else inputs.constant_amax,
    )


def _weight_method(scaling: str, algorithm: Algorithm) -> WeightMethod:
    """How Model Optimizer chooses the block scales of an NVFP4 weight under an algorithm.

    The sweep changes static weights only; the multiplier search changes every weight, the global
    scale of a dynamic one included, and equals four-over-six only for its own two candidates.
    """
    multipliers = algorithm.multipliers
    if scaling == "four_over_six":
        if multipliers != _FOUR_OVER_SIX_MULTIPLIERS:
            raise RefusedFormat(
                f"NVFP4 four_over_six weights under algorithm {algorithm.describe()}",
                "use method mse with start_multiplier 1.0, stop_multiplier 1.5, step_size 0.5",
            )
        return WeightMethod.four_over_six
    if multipliers:
        raise RefusedFormat(
            f"{scaling} NVFP4 weights (not four_over_six) under algorithm {algorithm.describe()}",
            "set fp8_scale_sweep: true, or block_sizes.four_over_six: true with multipliers "
            "1.0 and 1.5",
        )
    if scaling == "dynamic":
        return WeightMethod.max_dynamic
    return WeightMethod.mse if algorithm.fp8_scale_sweep else WeightMethod.max


def kv_format(keys: QuantizerFormat | None, values: QuantizerFormat | None) -> KVFormat | None:
    """The KV cache of one attention layer, or None where it stays in BF16.

    Raises:
        RefusedFormat: Not FP8, or keys and values that differ.
    """
    if keys is None and values is None:
        return None
    if keys != values or keys is None:
        raise RefusedFormat(
            f"keys in {_name(keys)} and values in {_name(values)} in the KV cache",
            "give both one format ('*[kv]_bmm_quantizer')",
        )
    if keys.format is not Format.fp8:
        raise RefusedFormat(f"{_name(keys)} KV cache", "use FP8 (num_bits: e4m3)")
    return KVFormat(keys.constant_amax)


def describe(attributes: Attributes) -> str:
    """Names what attributes ask for, e.g. `INT4 in blocks of 128` or `MXFP4`."""
    bits = _tuple(attributes["num_bits"])
    base = _BASE_NAMES.get(bits, str(bits)) if isinstance(bits, tuple) else f"INT{bits}"
    blocks: Mapping[int | str, object] | None = attributes.get("block_sizes")
    if blocks is None:
        axis = attributes.get("axis")
        text = f"{base} per tensor" if axis is None else f"{base} per channel (axis {axis})"
    else:
        sizes = "x".join(str(blocks[key]) for key in blocks if isinstance(key, int))
        scale_bits = _tuple(blocks.get("scale_bits"))
        if scale_bits == _E8M0:
            text = f"MX{base}"
        elif bits == _E2M1 and scale_bits == _E4M3:
            text = f"NVFP4 in blocks of {sizes}"
            if blocks.get("four_over_six"):
                text += f" with four_over_six and {blocks.get('type', 'static')} scales"
        else:
            text = f"{base} in blocks of {sizes}"
    extras = sorted(set(attributes) - _READ - {"axis"})
    return text + "".join(f", {key}={attributes[key]}" for key in extras)


def _name(quantizer: QuantizerFormat | None) -> str:
    if quantizer is None:
        return "BF16"
    constant = quantizer.constant_amax
    return quantizer.format.name.upper() + ("" if constant is None else f" (amax {constant:g})")


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
