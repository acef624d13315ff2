"""Layersweep's side: the slot, the packer and the writer of the sweep, on one layer.

In: the layer, a recipe, micro-batches. Out: figures, and a directory with the layer's shard file.
Every use of the pipeline is one of the small functions at the end, as the sweep does it on one
rank; in a sweep packing and writing also run beside the forward pass, here they are timed alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.architecture import LayerType
from pipeline.calibration.choose import choose_scalars
from pipeline.calibration.observers import LayerObserver
from pipeline.calibration.reduce import reduce_statistics
from pipeline.checkpoint.staging import StagingRing
from pipeline.checkpoint.writer import ShardWriter
from pipeline.job import Job, build_job, estimate_stored
from pipeline.outbox import Outbox
from pipeline.packing import LayerPacker
from pipeline.recipe import load_recipe
from pipeline.runtime.collectives import Ranks
from pipeline.sharding import ParallelDims
from pipeline.weights import SlotWeights

from .layer import LAYER, Layer
from .timing import Figures, measure_batches

PRESETS = Path(__file__).parents[2] / "conf" / "recipe"
WRITE_THREADS = 8
SHARD_BYTES = 10**9  # the default of max_shard_gb


@dataclasses.dataclass(frozen=True)
class Ours:
    """What the sweep would hold for this layer on one rank."""

    job: Job
    ranks: Ranks
    slot: Any
    packer: LayerPacker


def run(
    layer: Layer,
    figures: Figures,
    directory: Path,
    *,
    recipe: str,
    batches: list[int],
    tokens: int,
    sequences: int,
    limit_s: float,
) -> None:
    """Measures everything; `figures` keeps what was found, also where a later step fails.

    Args:
        layer: What to calibrate and export.
        figures: Where results go.
        directory: Where the export goes.
        recipe: A preset's name, or one in Model Optimizer's library.
        batches: Sequences per forward call, each measured.
        tokens: Calibration tokens of each measurement.
        sequences: Distinct sequences, repeated until `tokens` are reached.
        limit_s: Seconds after which a measurement ends early.
    """
    with figures.timed("build_s"):
        ours = build_ours(layer, recipe)
    scalars = _calibrate(ours, layer.sequences(sequences), figures, batches, tokens, limit_s)
    with figures.timed("first_pack_s"):  # compiles kernels
        pack_ours(ours)
    with figures.timed("choose_and_pack_s"):
        pack_ours(ours)
    copies = copies_of(ours, layer) | scalars
    buffers = staging_of(ours)
    figures.reset_peak()
    with figures.timed("choose_pack_write_s"):
        figures.set("sha256", write_ours(ours, directory, copies, buffers))
    figures.set("export_peak_gib", figures.peak_gib())


def _calibrate(
    ours: Ours,
    pool: list[torch.Tensor],
    figures: Figures,
    batches: list[int],
    tokens: int,
    limit_s: float,
) -> dict[str, torch.Tensor]:
    """Measures with and without observers; returns input_scale of every projection.

    The scales come from every sequence, once: the tokens that the other side sees.
    """
    for name, observed in (("plain_forward", False), ("calibrate", True)):
        measure_batches(
            figures,
            name,
            functools.partial(_forward_of, ours, pool, observed),
            [batch for batch in batches if batch <= len(pool)],
            seq_len=pool[0].shape[0],
            tokens=tokens,
            limit_s=limit_s,
        )
    observer = observer_of(ours)
    for sequence in pool:
        forward_ours(ours, [sequence], observer)
    return {name: torch.tensor(value) for name, value in scalars_of(ours, observer).items()}


def _forward_of(
    ours: Ours, pool: list[torch.Tensor], observed: bool, batch: int
) -> Callable[[int], object]:
    """The calls of one measurement; one is made beforehand, which compiles kernels."""
    starts = range(0, len(pool) - batch + 1, batch)
    observer = observer_of(ours) if observed else None

    def forward(call: int) -> torch.Tensor:
        start = starts[call % len(starts)]
        return forward_ours(ours, pool[start : start + batch], observer)

    forward(0)
    return forward


# ---- every use of the pipeline


def build_ours(layer: Layer, recipe: str) -> Ours:
    """A filled slot in bf16, the schedule of the layer, and the packer for its device."""
    from pipeline.mcore import backend
    from pipeline.mcore.slots import build_slots

    architecture, dims = layer.architecture, ParallelDims()
    job = build_job(architecture, dims, load_recipe(recipe, PRESETS), estimate_stored(architecture))
    groups = backend.start(dims, 0, layer.device)
    slots = build_slots(
        architecture,
        dims,
        0,
        groups,
        device=layer.device,
        compute_dtype=torch.bfloat16,
        seq_len=layer.shape.seq_len,
    )
    slot = slots[LayerType.moe]
    slot.fill(LAYER, lambda spec, _shard: layer.weight(spec))
    ranks = Ranks(groups.world, groups.tp, groups.etp, layer.device)
    packs_by = "triton" if layer.device.type == "cuda" else "reference"
    return Ours(job, ranks, slot, LayerPacker(architecture, dims, ranks, backend=packs_by))


def observer_of(ours: Ours) -> LayerObserver:
    """A fresh tap for everything that the recipe calibrates, and for tokens per expert."""
    experts = ours.job.architecture.n_routed_experts
    return LayerObserver(ours.job.schedules[LAYER].observed, experts, ours.ranks.device)


def forward_ours(
    ours: Ours, sequences: list[torch.Tensor], observer: LayerObserver | None
) -> torch.Tensor:
    """One micro-batch; the slot may overwrite the stack, which is made anew for every call."""
    hidden = torch.stack(sequences, dim=1)  # [seq, batch, hidden]
    if observer is not None:
        weights = torch.ones(len(sequences), device=ours.ranks.device)
        observer.begin_batch(weights, hidden.shape[0])
    output: torch.Tensor = ours.slot.forward(hidden, observer)
    return output


def scalars_of(ours: Ours, observer: LayerObserver) -> dict[str, float]:
    """input_scale of every projection, by tensor name."""
    reduced = reduce_statistics(observer.statistics(), ours.ranks.world)
    reduced.pop("tokens_per_expert", None)
    return choose_scalars(
        ours.job.schedules[LAYER],
        {name: value.float() for name, value in reduced.items()},
        ours.job.architecture.n_routed_experts,
        clamp_kv_scales=False,
        unobserved_input_scale=None,
    )


@torch.inference_mode()
def pack_ours(ours: Ours) -> None:
    """Chooses and packs the layer on the device, with its error statistics; keeps nothing."""
    packing = ours.packer.begin(ours.job.schedules[LAYER], SlotWeights(ours.slot))
    for _ in packing.steps():
        pass
    packing.finish()


def copies_of(ours: Ours, layer: Layer) -> dict[str, torch.Tensor]:
    """Tensors that keep the source's bytes, on the host as the source gives them."""
    return {spec.name: layer.weight(spec).cpu() for spec, _ in ours.job.schedules[LAYER].copies}


def staging_of(ours: Ours) -> StagingRing | None:
    """Pinned host memory for packed tensors; made once for all layers."""
    if ours.ranks.device.type != "cuda":
        return None
    packing = ours.packer.begin(ours.job.schedules[LAYER], SlotWeights(ours.slot))
    sizes = [block.nbytes for block in packing.work.blocks]
    # As the sweep's plan does it: room for all that a layer writes.
    return StagingRing(sum(sizes) + 2 * max(sizes), pinned=True)


@torch.inference_mode()
def write_ours(
    ours: Ours, directory: Path, copies: dict[str, torch.Tensor], buffers: StagingRing | None
) -> list[str]:
    """Chooses, packs and writes the shard files, synced and checksummed; returns their SHA-256."""
    packing = ours.packer.begin(ours.job.schedules[LAYER], SlotWeights(ours.slot))
    device = ours.ranks.device
    with ShardWriter(directory, threads=WRITE_THREADS) as writer:
        blocks, name = packing.work.blocks, "layer-00000-rank-00000"
        outbox = Outbox(writer, name, blocks, copies, buffers, device, limit=SHARD_BYTES)
        for packed in packing.steps():
            outbox.send(packed)
        records = [file.result() for file in outbox.finish()]
    packing.finish()
    return [record.sha256 for record in records]
