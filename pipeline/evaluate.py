"""Answering `launch.evaluate`: what a quantized checkpoint lost, from the files alone.

In: an `EvaluateConfig` and this process's place: a directory (ours or Model Optimizer's), its BF16
source, text. Out: a table or JSON, `evaluation.json` where asked for, and the exit status. Nothing
of the run that made the directory is needed, and everything that can be refused is refused before
the first layer is read.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.architecture import LayerType, expected_tensors
from pipeline.checkpoint.quantization_config import NVFP4_ALGORITHMS
from pipeline.checkpoint.weight_errors import WeightErrors
from pipeline.config import PlanOutput
from pipeline.config_evaluate import EvaluateConfig
from pipeline.errors import NumericsError
from pipeline.evaluation.fidelity import Head
from pipeline.evaluation.filling import LayerFiller
from pipeline.evaluation.findings import (
    add_errors,
    find_changed_copies,
    find_outlying_layers,
    find_wrong_weights,
)
from pipeline.evaluation.gates import missed_gates
from pipeline.evaluation.in_sweep import conclude
from pipeline.evaluation.opening import Opened, describe_text, load_text, open_both
from pipeline.evaluation.records import EvaluationReport, ServingMode
from pipeline.evaluation.streams import Streams
from pipeline.evaluation.table import EvaluationResult, print_result, to_values, write_result
from pipeline.preflight import Preflight
from pipeline.preparation import Place
from pipeline.report.fidelity import clipping_warnings, input_warnings, sample_warnings
from pipeline.report.plan_table import print_json
from pipeline.runtime.collectives import Ranks, broadcast_object, gather_objects
from pipeline.runtime.connecting import connecting
from pipeline.runtime.progress import Progress
from pipeline.weights import LayerSlot

logger = logging.getLogger(__name__)

MODES = tuple(ServingMode)


def evaluate(config: EvaluateConfig, conf_dir: Path, place: Place) -> int:
    """Evaluates, prints and writes; returns 0, or 1 where a gate or a weight failed (on rank 0).

    Args:
        config: What the user asked for.
        conf_dir: Directory of the presets (conf/).
        place: This process among the ranks.

    Raises:
        AuditError: The directory breaks a rule of the format.
        LayersweepError: Anything else that a user can cause.
    """
    clock = time.monotonic()
    preflight = Preflight(place, conf_dir, answer_s=60.0 * config.timeout_minutes)
    with preflight.sharing():
        opened = open_both(config, place)
        token_ids = None
        if place.rank == 0:
            _announce(opened)
            token_ids = load_text(config, conf_dir, opened)
    preflight.check_reading(config, [opened.source, opened.checkpoint.files])
    from pipeline.mcore import backend

    with connecting(place.rank, place.world):
        groups = backend.start(
            opened.dims, place.rank, opened.device, timeout_s=60.0 * config.timeout_minutes
        )
    ranks = Ranks(groups.world, groups.tp, groups.etp, opened.device)
    token_ids = broadcast_object(token_ids, ranks.world)
    result = _measure(config, opened, ranks, groups, token_ids)
    failed = False
    if result is not None:
        result.report.seconds = time.monotonic() - clock
        _tell(config, result)
        failed = bool(result.report.rejected)
    return int(broadcast_object(failed, ranks.world))


def _measure(
    config: EvaluateConfig,
    opened: Opened,
    ranks: Ranks,
    groups: Any,
    token_ids: torch.Tensor,
) -> EvaluationResult | None:
    """All layers, then the comparison; the result on rank 0."""
    from pipeline.mcore.slots import build_slots

    architecture = opened.architecture
    outer = {
        spec.name: opened.read_source(spec)
        for spec in expected_tensors(architecture)
        if spec.layer is None
    }
    embedding = outer["backbone.embeddings.weight"]
    streams = Streams(
        token_ids,
        embedding.to(opened.device),
        opened.dims,
        ranks.rank,
        layers=len(architecture.layers),
        micro_batch=config.micro_batch,
        dtype=opened.dtype,
        device=opened.device,
        modes=MODES,
        backend=opened.backend,
    )
    slots = build_slots(
        architecture,
        opened.dims,
        ranks.rank,
        groups,
        device=opened.device,
        compute_dtype=opened.dtype,
        seq_len=config.seq_len,
    )
    errors, changed = _visit_layers(config, opened, ranks, slots, streams)
    norm, head = outer["backbone.norm_f.weight"], outer.get("lm_head.weight", embedding)
    report = conclude(
        streams,
        Head(norm, head, architecture.layer_norm_epsilon),
        ranks,
        architecture,
        data=describe_text(config),
        dtype=opened.dtype,
    )
    parts = gather_objects(errors, ranks.world)
    copies = gather_objects(changed, ranks.world)
    if ranks.rank:
        return None
    wrong = find_changed_copies(list(dict.fromkeys(name for part in copies for name in part)))
    return _conclude(config, opened, report, add_errors(parts), wrong)


def _visit_layers(
    config: EvaluateConfig,
    opened: Opened,
    ranks: Ranks,
    slots: Mapping[LayerType, LayerSlot],
    streams: Streams,
) -> tuple[dict[str, WeightErrors], list[str]]:
    """Moves all streams through all layers.

    Returns:
        This rank's part of the weights' errors, and which unquantized tensors are not the source's.
    """
    progress = Progress(
        len(opened.architecture.layers),
        streams.store.tokens,
        opened.device,
        interval_s=config.progress_seconds,
        enabled=ranks.rank == 0,
    )
    with LayerFiller(
        opened.source,
        opened.stored,
        opened.checkpoint,
        opened.dims,
        ranks.rank,
        device=opened.device,
        backend=opened.backend,
        threads=config.read_threads,
        cast=config.cast,
    ) as filler:
        for layer, layer_type in enumerate(opened.architecture.layers):
            slot = slots[layer_type]
            filler.fill_from_source(slot, layer)
            streams.bf16(slot)
            scales = opened.checkpoint.layer_scales(layer)
            algorithms = {algorithm for _, algorithm in opened.checkpoint.layer_algorithms(layer)}
            # Without any it is not BF16's for sure: its copies may not be the source's.
            is_same = not algorithms & NVFP4_ALGORITHMS
            for mode in streams.modes:
                filler.fill_quantized(slot, layer, mode)
                streams.quantized(layer, mode, slot, scales, is_same=is_same)
            streams.end_layer()
            progress.layer_done(layer, layer_type, phase="evaluate")
        return filler.weight_errors(), filler.changed_copies()


def _conclude(
    config: EvaluateConfig,
    opened: Opened,
    report: EvaluationReport,
    weight_errors: Mapping[str, WeightErrors],
    wrong: list[str],
) -> EvaluationResult:
    """Gates, weights that are not the source's, and what stands out.

    Raises:
        NumericsError: The source itself predicts nothing.
    """
    checkpoint = opened.checkpoint
    if not math.isfinite(report.perplexity):
        raise NumericsError(
            f"perplexity of {config.source}",
            value=report.perplexity,
            rule="the source must predict the text, or there is nothing to compare with",
            remedy="check its weights and the text; with compute_dtype=bfloat16 try float32",
        )
    report.rejected = [
        f"{mode.mode.upper()}: its predictions are not finite"
        for mode in report.modes
        if not (math.isfinite(mode.kl_mean) and math.isfinite(mode.perplexity))
    ]
    report.rejected += missed_gates(report, config.evaluation)
    report.rejected += find_wrong_weights(weight_errors, checkpoint) + wrong
    errors = {module: found.relative for module, found in weight_errors.items()}
    warnings = find_outlying_layers(report.layers, checkpoint, errors)
    warnings += sample_warnings(report.modes) + clipping_warnings(report.modes)
    warnings += input_warnings(report.inputs)
    warnings += checkpoint.notes()
    warnings += checkpoint.audit.notes if checkpoint.audit is not None else []
    return EvaluationResult(
        directory=str(config.directory),
        source=config.source,
        report=report,
        weight_errors=errors,
        warnings=warnings,
    )


def _tell(config: EvaluateConfig, result: EvaluationResult) -> None:
    if config.report is not None:
        write_result(result, Path(config.report))
    if config.output is PlanOutput.json:
        print_json(to_values(result))
    else:
        print_result(result)


def _announce(opened: Opened) -> None:
    counts: dict[str, int] = {}
    for algorithm in opened.checkpoint.algorithms.values():
        counts[algorithm] = counts.get(algorithm, 0) + 1
    logger.info("source  %s; %s", opened.source.location, opened.dims.describe())
    logger.info(
        "audit   passed; quantized projections: %s",
        ", ".join(f"{number} {algorithm}" for algorithm, number in counts.items()),
    )
    logger.info(
        "not checked here: checksums, mtp.* and small files (tokenizer ...) against the source; "
        "layersweep-verify DIR source=... does"
    )
