"""What the terminal and the page both say: totals by kind, the verdict, figures in words.

In: a `RunReport`. Out: `KindSummary` records and short texts. No layout, no colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.report.records import KindReport, RunReport

ROLE_LABELS = {
    "routed_expert": "routed experts",
    "shared_expert": "shared expert",
    "mamba_in": "Mamba in",
    "mamba_out": "Mamba out",
    "attention_qkv": "attention QKV",
    "attention_out": "attention out",
    "mlp": "MLP",
    "latent": "latent proj.",
    "gate": "router",
    "mamba_other": "Mamba other",
    "norm": "norms",
    "bias": "biases",
    "embedding": "embedding",
    "head": "head",
    "mtp": "MTP",
}
METHOD_LABELS = {
    "four_over_six": "4-over-6",
    "mse": "MSE",
    "max": "max",
    "max_dynamic": "max, dyn.",
}
SECONDS_LABELS = {
    "read stall": "waiting for the source",
    "compute": "computing",
    "write stall": "waiting for the files",
}
FORMAT_LABELS = {"nvfp4": "NVFP4", "fp8": "FP8", "bf16": "BF16"}


@dataclass(kw_only=True)
class KindSummary:
    """The sum of all kinds of one role, format and method; ratios are None where not measured."""

    label: str
    role: str
    format: str
    method: str
    tensors: int
    parameters: int
    stored_bytes: int
    relative_error: float | None
    change_from_max: float | None
    m4_share: float | None
    flushed_share: float | None
    worst_tensor: str
    worst_relative_error: float


def all_kinds(report: RunReport) -> list[KindReport]:
    """Return the kinds of every layer, then those outside the layers."""
    return [kind for layer in report.layers for kind in layer.kinds] + report.outside


def summarize(kinds: Iterable[KindReport], label: str) -> KindSummary:
    """Add kinds up. Where they differ in role, format or method, that field is empty."""
    kinds = list(kinds)
    quantized = [kind for kind in kinds if kind.format != "bf16"]
    compared = [kind for kind in quantized if kind.squared_error_of_max is not None]
    of_max = sum(kind.squared_error_of_max or 0.0 for kind in compared)
    weight = sum(kind.squared_weight for kind in quantized)
    error = sum(kind.squared_error for kind in quantized)
    blocks = sum(kind.blocks for kind in quantized)
    chosen = [kind for kind in quantized if kind.method == "four_over_six"]
    chosen_blocks = sum(kind.blocks for kind in chosen)
    worst = max(quantized, key=lambda kind: kind.worst_relative_error, default=None)
    return KindSummary(
        label=label,
        role=_common(kind.role for kind in kinds),
        format=_common(kind.format for kind in kinds),
        method=_common(kind.method for kind in kinds),
        tensors=sum(kind.tensors for kind in kinds),
        parameters=sum(kind.parameters for kind in kinds),
        stored_bytes=sum(kind.stored_bytes for kind in kinds),
        relative_error=math.sqrt(error / weight) if weight > 0 else None,
        change_from_max=sum(k.squared_error for k in compared) / of_max - 1 if of_max > 0 else None,
        m4_share=sum(k.blocks_m4 for k in chosen) / chosen_blocks if chosen_blocks else None,
        flushed_share=sum(k.blocks_flushed for k in quantized) / blocks if blocks else None,
        worst_tensor=worst.worst_tensor if worst else "",
        worst_relative_error=worst.worst_relative_error if worst else 0.0,
    )


def summarize_kinds(report: RunReport, *, merge_copied: bool = False) -> list[KindSummary]:
    """Return one summary per role, format and method, quantized ones first, in a fixed order.

    Args:
        report: The run.
        merge_copied: Make one line of all tensors that are copied.
    """
    groups: dict[tuple[str, str, str], list[KindReport]] = {}
    for kind in all_kinds(report):
        copied = merge_copied and kind.format == "bf16"
        key = ("", "bf16", "") if copied else (kind.role, kind.format, kind.method)
        groups.setdefault(key, []).append(kind)
    order = list(ROLE_LABELS)

    def place(key: tuple[str, str, str]) -> tuple[bool, int, tuple[str, str, str]]:
        return key[1] == "bf16", order.index(key[0]) if key[0] in order else len(order), key

    return [
        summarize(groups[key], role_label(key[0]) if key[0] else "copied as it is")
        for key in sorted(groups, key=place)
    ]


def role_label(role: str) -> str:
    """Return a role in words; an unknown one as it is."""
    return ROLE_LABELS.get(role, role)


def has_passed(report: RunReport) -> bool | None:
    """Whether the audit passed; None where there was none."""
    return bool(report.audit["passed"]) if "passed" in report.audit else None


def verdict(report: RunReport) -> str:
    """Say in one sentence what came out, whether it passed, how big it is and what it cost."""
    passed = {True: "Passed the audit", False: "FAILED the audit", None: "Not audited"}
    if "rehearsal" in report.audit:
        passed[None] = passed[True] = "Rehearsed, nothing written"
    total = summarize(all_kinds(report), "total")
    parts = [
        f"{passed[has_passed(report)]}: {format_bytes(report.bf16_bytes)} of BF16 became "
        f"{format_bytes(report.quantized_bytes)}, {report.effective_bits:.2f} bits per parameter"
    ]
    if total.relative_error is not None:
        change = ""
        if total.change_from_max is not None and round(total.change_from_max, 4):
            change = f" (squared error {format_change(total.change_from_max)} against max)"
        parts.append(f"relative error {format_percent(total.relative_error)} %{change}")
    if report.phases:
        hardware = f" on {report.hardware}" if report.hardware else ""
        parts.append(f"{format_seconds(sum(report.phases.values()))}{hardware}")
    return "; ".join(parts) + "."


def describe_loss(report: RunReport) -> str:
    """Describe the BF16 loss beside the loss of token frequencies; empty without a forward."""
    if report.loss is None:
        return ""
    text = f"{report.loss:.4f} nats per token in BF16"
    if report.unigram_loss is not None:
        worse = report.loss >= report.unigram_loss
        judged = "WORSE than token frequencies alone" if worse else "token frequencies alone"
        text += f" ({judged}: {report.unigram_loss:.4f})"
    return text


def describe_size(report: RunReport) -> str:
    """Describe the size beside the plan's."""
    text = (
        f"{format_bytes(report.bf16_bytes)} -> {format_bytes(report.quantized_bytes)}, "
        f"{report.effective_bits:.2f} bits per parameter"
    )
    if report.predicted_bytes is None:
        return text
    if report.predicted_bytes == report.quantized_bytes:
        return text + ", as planned to the byte"
    return text + f", {report.quantized_bytes - report.predicted_bytes:+,} bytes off the plan"


def describe_coverage(report: RunReport, most_named: int = 6) -> str:
    """Say how the tokens spread over the experts, naming some that saw none."""
    layers = [layer for layer in report.coverage if layer.tokens_per_expert]
    if not layers:
        return ""
    widths = {len(layer.tokens_per_expert) for layer in layers}
    width = str(widths.pop()) if len(widths) == 1 else f"{min(widths)} to {max(widths)}"
    head = f"{len(layers)} layer{'s' * (len(layers) > 1)} x {width}"
    unseen = [
        (layer.layer, expert)
        for layer in layers
        for expert, tokens in enumerate(layer.tokens_per_expert)
        if tokens == 0
    ]
    if unseen:
        named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in unseen[:most_named])
        more = f" and {len(unseen) - most_named} more" if len(unseen) > most_named else ""
        return f"{head}, {len(unseen)} saw no token: {named}{more}"
    fewest, layer, expert = min(
        (tokens, layer.layer, expert)
        for layer in layers
        for expert, tokens in enumerate(layer.tokens_per_expert)
    )
    share = fewest / sum(next(x.tokens_per_expert for x in layers if x.layer == layer))
    return (
        f"{head}, all reached; fewest: {fewest:,} tokens, {format_percent(share)} % of its layer's"
        f" (layer {layer} expert {expert})"
    )


def layer_seconds(report: RunReport) -> dict[str, float]:
    """Return what the layers' time went to, in words, summed over the layers; it may overlap."""
    total: dict[str, float] = {}
    for layer in report.layers:
        for kind, seconds in layer.seconds.items():
            label = SECONDS_LABELS.get(kind, kind)
            total[label] = total.get(label, 0.0) + seconds
    return total


def describe_layout(report: RunReport) -> str:
    """Return the degrees in one line, such as `world 4, tp 2, ep 2`."""
    return ", ".join(f"{axis} {degree}" for axis, degree in report.layout.items())


def format_bytes(count: float) -> str:
    """Return bytes in decimal units, four significant digits: 352.3 GB."""
    for unit, size in (("TB", 1e13), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / (1e12 if unit == "TB" else size)
            digits = 0 if value >= 1000 else 1 if value >= 100 else 2
            return f"{value:,.{digits}f} {unit}"
    return f"{count:.0f} B"


def format_percent(ratio: float | None, digits: int = 2) -> str:
    """Return a ratio as a percentage without its sign; what rounds to nothing as `<0.01`."""
    if ratio is None or not math.isfinite(ratio):
        return "-"
    least = 10.0**-digits
    return f"<{least:g}" if 0 < 100 * ratio < least else f"{100 * ratio:.{digits}f}"


def format_change(ratio: float | None) -> str:
    """Return a relative change with its sign: -16.4 %."""
    return "-" if ratio is None or not math.isfinite(ratio) else f"{100 * ratio:+.1f} %"


def format_seconds(seconds: float) -> str:
    """Return a duration: 12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _common(values: Iterable[str]) -> str:
    """Return the value that all share, or an empty text."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else ""
