"""What quantization cost, in words and cells: the verdict, the serving modes, what to try.

In: an `EvaluationReport`. Out: short texts, rows of cells and the worst layers and groups, for the
terminal, the page and run.json alike. Only figures that were measured; no layout, no colour.
"""

from __future__ import annotations

import math

from pipeline.evaluation.records import (
    EvaluationReport,
    Fidelity,
    GroupHarm,
    InputRange,
    LayerErrors,
)
from pipeline.report.records import RunReport
from pipeline.report.summary import FORMAT_LABELS, format_change, format_percent

MODE_LABELS = {"w4a4": "W4A4", "w4a16": "W4A16"}
MODE_HARDWARE = {"w4a4": "Blackwell", "w4a16": "Hopper"}
TYPE_LABELS = {"mamba": "Mamba", "attention": "attention", "moe": "MoE", "mlp": "MLP"}
KV_CACHE = "kv_cache"
MOST_GROUPS = 15
MOST_ADVICE = 3
# Share of clipped inputs above which a warning says so.
MOST_CLIPPED = 0.001
# Of one input; held-out text measures up to 0.00006 in the demo and in Model Optimizer's exports.
MOST_CLIPPED_INPUT = 0.003
# Largest value over the calibrated amax; held-out text measures 0.75 and more.
LEAST_REACH = 1 / 16
MOST_INPUTS = 10
FEWEST_PREDICTIONS = 1000
HOW_TO_MEASURE = (
    "What quantization cost was not measured: evaluation.num_sequences=8 measures it during a run, "
    "python -m launch.evaluate on a finished checkpoint."
)


def describe_fidelity(evaluation: EvaluationReport) -> str:
    """Say in one sentence what the first serving mode keeps of the BF16 model."""
    if not evaluation.modes:
        return f"No serving mode was measured; perplexity {_number(evaluation.perplexity)} in BF16."
    first = evaluation.modes[0]
    return (
        f"{mode_label(first.mode)} keeps {_kept(first.top1)} % of the top-1 tokens, "
        f"KL {_number(first.kl_mean)} nats, perplexity {format_perplexity(first.perplexity)} "
        f"against {format_perplexity(evaluation.perplexity)} ({_change(evaluation, first)})."
    )


def describe_rejection(evaluation: EvaluationReport) -> str:
    """Name the gates that were not passed; empty where all were."""
    return f"Rejected: {'; '.join(evaluation.rejected)}." if evaluation.rejected else ""


def describe_sample(evaluation: EvaluationReport) -> str:
    """Say on what the figures were measured."""
    text = f"{evaluation.sequences:,} x {evaluation.seq_len:,} tokens"
    return f"{text}: {evaluation.data}" if evaluation.data else text


def mode_rows(evaluation: EvaluationReport) -> list[list[str]]:
    """Return one row per figure: its name, then one cell per serving mode."""
    modes = evaluation.modes
    figures = [
        (
            f"perplexity (BF16: {format_perplexity(evaluation.perplexity)})",
            [format_perplexity(mode.perplexity) for mode in modes],
        ),
        ("perplexity against BF16", [_change(evaluation, mode) for mode in modes]),
        ("mean KL, nats per token", [_with_error(mode) for mode in modes]),
        ("99th percentile of KL", [_number(mode.kl_p99) for mode in modes]),
        ("same top-1 token, %", [_kept(mode.top1) for mode in modes]),
        ("clipped inputs, %", [format_percent(mode.clipped, 3) for mode in modes]),
    ]
    return [[name, *cells] for name, cells in figures]


def all_warnings(report: RunReport) -> list[str]:
    """Return the run's warnings, after those that the evaluation gives rise to."""
    if report.evaluation is None:
        return list(report.warnings)
    return [
        *clipping_warnings(report.evaluation.modes),
        *sample_warnings(report.evaluation.modes),
        *input_warnings(report.evaluation.inputs),
        *report.warnings,
    ]


def input_warnings(inputs: list[InputRange]) -> list[str]:
    """Name the inputs whose scale the text contradicts, the most clipped first."""

    def share(item: InputRange) -> float:
        return max(item.clipped.values(), default=0.0)

    small = sorted((i for i in inputs if share(i) > MOST_CLIPPED_INPUT), key=share, reverse=True)
    # The scales of a cache are at least 1, whatever its amax.
    large = [i for i in inputs if i.reach < LEAST_REACH and not i.tap.endswith("_cache")]
    found = [
        f"layer {item.layer}, {item.tap}: {format_percent(share(item))} % of the inputs lie beyond "
        f"the range of {item.scale_name}, the largest {item.reach:.3g} times: the scale is too "
        "small, or the text unlike that of the calibration"
        for item in small
    ] + [
        f"layer {item.layer}, {item.tap}: the largest input reaches {item.reach:.3g} of the range "
        f"of {item.scale_name}: the scale is too large, or the text unlike that of the calibration"
        for item in large
    ]
    if len(found) > MOST_INPUTS:
        return [*found[:MOST_INPUTS], f"{len(found)} such inputs in all"]
    return found


def sample_warnings(modes: list[Fidelity]) -> list[str]:
    """Say where the figures are means over few tokens."""
    counts = [mode.predictions for mode in modes if 0 < mode.predictions < FEWEST_PREDICTIONS]
    return [
        f"{count:,} predictions are few: below {FEWEST_PREDICTIONS:,} chance decides; raise "
        "evaluation.num_sequences"
        for count in counts[:1]
    ]


def clipping_warnings(modes: list[Fidelity]) -> list[str]:
    """Name the serving modes in which many inputs lie beyond what was calibrated."""
    return [
        f"{mode_label(mode.mode)} clips {format_percent(mode.clipped)} % of the quantized inputs, "
        "which lie beyond the calibrated amax: calibrate on more text, or on text nearer to the use"
        for mode in modes
        if mode.clipped > MOST_CLIPPED
    ]


def worst_layers(evaluation: EvaluationReport, most: int) -> list[LayerErrors]:
    """Return the layers with the largest error of their own in any mode, the worst first."""
    measured = [layer for layer in evaluation.layers if _largest(layer) > 0]
    return sorted(measured, key=lambda layer: (-_largest(layer), layer.layer))[:most]


def layer_row(layer: LayerErrors, modes: list[Fidelity]) -> list[str]:
    """Return a layer's cells: index, type, and per mode its error alone in %."""
    errors = [format_percent(layer.alone.get(str(mode.mode))) for mode in modes]
    return [str(layer.layer), type_label(layer.layer_type), *errors]


def worst_groups(evaluation: EvaluationReport, most: int = MOST_GROUPS) -> list[GroupHarm]:
    """Return the groups that add most KL, the worst first; those not finite count as worst."""

    def harm(group: GroupHarm) -> float:
        return group.kl_mean if math.isfinite(group.kl_mean) else math.inf

    return sorted(evaluation.groups, key=harm, reverse=True)[:most]


def group_row(group: GroupHarm) -> list[str]:
    """Return a group's cells: where it is, format, KL, the bits that FP8 and BF16 cost, pattern."""
    fp8 = "-" if group.extra_bits_fp8 is None else format_bits(group.extra_bits_fp8)
    return [
        str(group.layer),
        type_label(group.layer_type),
        group_label(group.group),
        format_label(group.format),
        _number(group.kl_mean),
        fp8,
        format_bits(group.extra_bits_bf16),
        group.pattern,
    ]


def advise(evaluation: EvaluationReport, most: int = MOST_ADVICE) -> list[tuple[str, str, str]]:
    """Say what to try for the worst groups.

    Returns:
        (which group, the recipe's pattern, what moving it would cost). The KV cache is left out:
        its format is one for all attention layers.
    """
    movable = [g for g in worst_groups(evaluation, len(evaluation.groups)) if g.group != KV_CACHE]
    chosen = movable[:most]
    advice = [(describe_group(group), group.pattern, describe_cost(group)) for group in chosen]
    cheapest = max(movable, key=_harm_per_bit, default=None)
    if cheapest is not None and cheapest not in chosen and _harm_per_bit(cheapest) > 0:
        where = f"most KL for its bits: {describe_group(cheapest)}"
        advice.append((where, cheapest.pattern, describe_cost(cheapest)))
    return advice


def describe_group(group: GroupHarm) -> str:
    """Return a group in words, with the KL it adds."""
    return f"layer {group.layer}, {group_label(group.group)} (KL {_number(group.kl_mean)})"


def describe_cost(group: GroupHarm) -> str:
    """Say what a group costs in the next formats, in bits per parameter of the checkpoint."""
    if group.extra_bits_fp8 is None:
        return f"BF16 {format_bits(group.extra_bits_bf16)} bits per parameter"
    fp8, bf16 = format_bits(group.extra_bits_fp8), format_bits(group.extra_bits_bf16)
    return f"FP8 {fp8}, BF16 {bf16} bits per parameter"


def mode_label(mode: str) -> str:
    """Return a serving mode in words; an unknown one as it is."""
    return MODE_LABELS.get(str(mode), str(mode))


def type_label(layer_type: str) -> str:
    """Return a layer type in words; an unknown one as it is."""
    return TYPE_LABELS.get(layer_type, layer_type)


def group_label(group: str) -> str:
    """Return a group of projections in words."""
    words = {KV_CACHE: "KV cache", "mlp": "MLP"}
    return words.get(group, group if group.endswith("_proj") else group.replace("_", " "))


def format_label(formats: str) -> str:
    """Return formats joined by commas in words."""
    names = [name.strip() for name in formats.split(",")]
    return ", ".join(FORMAT_LABELS.get(name, name) for name in names)


def format_perplexity(perplexity: float) -> str:
    """Return a perplexity: 5.313, 53.13, 1,234."""
    if not math.isfinite(perplexity):
        return "not finite"
    digits = 3 if perplexity < 10 else 2 if perplexity < 1000 else 0
    return f"{perplexity:,.{digits}f}"


def format_bits(bits: float) -> str:
    """Return bits per parameter that would be added, with their sign."""
    if not math.isfinite(bits):
        return "-"
    return "<0.001" if 0 < bits < 0.0005 else f"{bits:+.3f}" if bits else "0"


def _change(evaluation: EvaluationReport, mode: Fidelity) -> str:
    return format_change(mode.perplexity / evaluation.perplexity - 1)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _with_error(mode: Fidelity) -> str:
    """Return the mean KL, with its standard error where it is known."""
    if not (mode.kl_error and math.isfinite(mode.kl_error)):
        return _number(mode.kl_mean)
    return f"{_number(mode.kl_mean)} +- {mode.kl_error:.1g}"


def _kept(share: float) -> str:
    """Return a share in percent; less than all never reads as 100."""
    if not math.isfinite(share) or share == 1 or 100 * share < 99.95:
        return format_percent(share, 1)
    return "99.99" if 100 * share >= 99.995 else format_percent(share)


def _largest(layer: LayerErrors) -> float:
    """A layer's error alone, the larger of the modes'; one that is not finite is the worst."""
    return max((e if math.isfinite(e) else math.inf for e in layer.alone.values()), default=0.0)


def _harm_per_bit(group: GroupHarm) -> float:
    known = group.extra_bits_bf16 > 0 and math.isfinite(group.kl_mean)
    return group.kl_mean / group.extra_bits_bf16 if known else 0.0
