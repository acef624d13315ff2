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
    """

    mode: str
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1: float
    clipped: float


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
        "groups": [{**item, "kl_mean": _number(item["kl_mean"])} for item in values["groups"]],
    }
    parts = {"modes": Fidelity, "layers": LayerErrors, "groups": GroupHarm}
    built = {name: [kind(**item) for item in values[name]] for name, kind in parts.items()}
    return EvaluationReport(**{**values, **built})


def _number(value: Any) -> Any:
    return math.nan if value is None else value
