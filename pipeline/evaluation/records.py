"""What an evaluation found: plain numbers, nothing of torch.

KL is of the BF16 model's next-token distribution to the quantized one's, in nats per token.
Hidden-state errors are relative: norm of the difference over norm of the BF16 model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class ServingMode(StrEnum):
    """How a server computes with NVFP4 weights; FP8 layers and the KV cache are alike in both."""

    w4a4 = "w4a4"
    """Blackwell: inputs are quantized to NVFP4 too."""
    w4a16 = "w4a16"
    """Hopper: inputs stay 16-bit, and block scales below 2**-6 are flushed to zero."""


@dataclass(kw_only=True)
class Fidelity:
    """The quantized model in one serving mode against the BF16 model, on the same tokens.

    Attributes:
        mode: `ServingMode`.
        perplexity: Of the quantized model.
        kl_mean: Mean KL.
        kl_p99: 99th percentile of the tokens' KL.
        top1: Share of positions at which both models find the same token most likely.
        clipped: Share of the elements of quantized inputs that lie beyond the calibrated amax.
        predictions: Tokens that the figures are means over; 0 in reports of older runs.
        kl_error: Standard error of `kl_mean` over tokens, as if these were independent: text gives
            less, so it is the least that chance does.
        ratio_error: Likewise of the perplexity's ratio to that of the BF16 model.
    """

    mode: str
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1: float
    clipped: float
    predictions: int = 0
    kl_error: float = 0.0
    ratio_error: float = 0.0


@dataclass(kw_only=True)
class LayerErrors:
    """Relative errors of the hidden states that leave a layer, by serving mode.

    Attributes:
        layer: Its index.
        layer_type: mamba, attention, moe or mlp.
        accumulated: Of the stream in which this layer and all before it are quantized.
        alone: Of this layer alone, on the BF16 model's input.
    """

    layer: int
    layer_type: str
    accumulated: dict[str, float]
    alone: dict[str, float]


@dataclass(kw_only=True)
class InputRange:
    """How a quantized input, or the keys or values of a cache, fits its calibrated range.

    Attributes:
        layer: Its index.
        tap: Which input: `in_proj`, `qkv`, `experts.down_proj`, `k_cache` ...
        clipped: Share of the elements that lie beyond the calibrated amax, by serving mode.
        reach: Largest absolute value over the calibrated amax.
    """

    layer: int
    tap: str
    clipped: dict[str, float]
    reach: float

    @property
    def scale_name(self) -> str:
        """The tensor that holds the scale, `*` for every expert; q, k and v have equal ones."""
        prefix = f"backbone.layers.{self.layer}.mixer"
        if self.tap in ("k_cache", "v_cache"):
            return f"{prefix}.{self.tap[0]}_proj.{self.tap[0]}_scale"
        module = {"qkv": "[qkv]_proj"}.get(self.tap, self.tap)
        if module.startswith("experts."):
            module = module.replace("experts.", "experts.*.")
        return f"{prefix}.{module}.input_scale"


@dataclass(kw_only=True)
class GroupHarm:
    """What quantizing one group of projections alone does, all others in BF16 (W4A4).

    Attributes:
        layer: Its index.
        layer_type: mamba, attention, moe or mlp.
        group: Its projections: `in_proj`, `out_proj`, `qkv`, `o_proj`, `kv_cache`,
            `routed_experts`, `shared_experts`, `latent`, `mlp`.
        pattern: A recipe's pattern that matches the group's quantizers and no others.
        format: nvfp4, fp8, or several joined by a comma.
        kl_mean: Mean KL that it adds.
        extra_bits_fp8: What FP8 weights instead would add to the checkpoint's effective bits;
            None where it is FP8 already.
        extra_bits_bf16: What BF16 weights instead would add to them.
    """

    layer: int
    layer_type: str
    group: str
    pattern: str
    format: str
    kl_mean: float
    extra_bits_fp8: float | None
    extra_bits_bf16: float


@dataclass(kw_only=True)
class EvaluationReport:
    """Everything that one evaluation found.

    Attributes:
        data: Where the text came from, in words.
        sequences: Evaluation sequences, none of which was calibrated on.
        seq_len: Tokens of each.
        arithmetic: What the figures are exact about, in words.
        perplexity: Of the BF16 model.
        modes: Of the quantized one.
        layers: In the model's order.
        inputs: In the model's order; empty in reports of older runs.
        groups: By harm, the worst first; empty where it was not asked for.
        group_tokens: Tokens that `groups` was measured on.
        seconds: What the evaluation took, wall clock.
        rejected: Gates that the checkpoint did not pass, in words; empty where all passed.
    """

    data: str
    sequences: int
    seq_len: int
    arithmetic: str
    perplexity: float
    modes: list[Fidelity]
    layers: list[LayerErrors] = field(default_factory=list)
    inputs: list[InputRange] = field(default_factory=list)
    groups: list[GroupHarm] = field(default_factory=list)
    group_tokens: int = 0
    seconds: float = 0.0
    rejected: list[str] = field(default_factory=list)


def restore(values: Mapping[str, Any]) -> EvaluationReport:
    """The report that `dataclasses.asdict` took apart; null stands for what is no finite number."""
    values = {
        **values,
        "perplexity": _number(values["perplexity"]),
        "modes": [{key: _number(value) for key, value in item.items()} for item in values["modes"]],
        "layers": [
            {
                **item,
                "accumulated": {key: _number(value) for key, value in item["accumulated"].items()},
                "alone": {key: _number(value) for key, value in item["alone"].items()},
            }
            for item in values["layers"]
        ],
        "inputs": [
            {
                **item,
                "clipped": {key: _number(value) for key, value in item["clipped"].items()},
                "reach": _number(item["reach"]),
            }
            for item in values.get("inputs", [])
        ],
        "groups": [{**item, "kl_mean": _number(item["kl_mean"])} for item in values["groups"]],
    }
    parts = {"modes": Fidelity, "layers": LayerErrors, "inputs": InputRange, "groups": GroupHarm}
    built = {name: [kind(**item) for item in values[name]] for name, kind in parts.items()}
    return EvaluationReport(**{**values, **built})


def _number(value: Any) -> Any:
    return math.nan if value is None else value
