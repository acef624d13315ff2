"""Gates: what a checkpoint must reach to get its name.

In: what was measured and what was asked for. Out: every gate that was missed, in words.
"""

from __future__ import annotations

from pipeline.config import EvaluationConfig
from pipeline.evaluation.records import EvaluationReport, Fidelity


def missed_gates(report: EvaluationReport, asked: EvaluationConfig) -> list[str]:
    """Every gate that a serving mode misses; a figure that is no number misses its gate."""
    missed = []
    for mode in report.modes:
        ratio = mode.perplexity / report.perplexity
        for name, value, limit, passes in (
            ("max_kl", mode.kl_mean, asked.max_kl, _at_most),
            ("min_top1", mode.top1, asked.min_top1, _at_least),
            ("max_perplexity_ratio", ratio, asked.max_perplexity_ratio, _at_most),
        ):
            if limit is not None and not passes(value, limit):
                missed.append(f"{_title(mode)}: {name}={limit:g}, measured {value:.5g}")
    return missed


def _at_most(value: float, limit: float) -> bool:
    return value <= limit


def _at_least(value: float, limit: float) -> bool:
    return value >= limit


def _title(mode: Fidelity) -> str:
    return mode.mode.upper()
