"""The sweep: visit every layer once; read, choose and pack, forward, reduce, commit.

In: a job, the source, a journal, and (for recipes that calibrate activations) slots and the
hidden store. Out: shard files and committed layers; `pipeline.calibrate` publishes them. Committed
layers of an earlier run are only passed through, so that the next ones get their inputs.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.architecture import LayerType, TensorSpec, layer_tensors
from pipeline.calibration.choose import choose_scalars
from pipeline.calibration.hidden import HiddenStore, MicroBatch
from pipeline.calibration.loss import next_token_loss, refuse_nonfinite_loss, unigram_loss
from pipeline.calibration.observers import LayerObserver
from pipeline.calibration.reduce import reduce_statistics, refuse_nonfinite
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.passthrough import take_copy
from pipeline.checkpoint.read_ahead import ReadAhead, Request
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.writer import FileRecord, Writable, write_safetensors
from pipeline.job import Job
from pipeline.packing import LayerPacker
from pipeline.runtime.collectives import Ranks, barrier, broadcast_object, gather_objects
from pipeline.runtime.progress import Progress
from pipeline.schedule import LayerSchedule, packs_expert, split_by_size
from pipeline.sharding import Shard, shard_of
from pipeline.weights import LayerSlot, LayerWeights, SlotWeights, StreamedWeights

logger = logging.getLogger(__name__)

OUTER = "outer"
SCALARS = "scalars"
LOSS = "loss"


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """What the sweep does with every layer alike.

    Attributes:
        clamp_kv_scales: Whether a KV scale is never below 1.0.
        unobserved_input_scale: Scale of a projection that no token reached; None refuses it.
        max_shard_bytes: Largest file for tensors outside the layers.
        cast: Round F16 and F32 weights to BF16 as they are read.
    """

    clamp_kv_scales: bool
    unobserved_input_scale: float | None
    max_shard_bytes: int
    cast: bool


@dataclasses.dataclass
class Sweep:
    """One rank's part in the sweep.

    Attributes:
        job: What was decided.
        source: Where weights come from.
        journal: Where committed layers are recorded.
        files: Directory of the shard files.
        ranks: Groups for collectives.
        packer: Chooses and packs.
        slots: A slot per layer type; None for recipes without a forward pass.
        store: The hidden store; None likewise.
        settings: The rest.
        progress: Speaks to the user.
    """

    job: Job
    source: Source
    journal: Journal
    files: Path
    ranks: Ranks
    packer: LayerPacker
    slots: Mapping[LayerType, LayerSlot] | None
    store: HiddenStore | None
    settings: SweepSettings
    progress: Progress

    def run(self) -> None:
        """Sweeps over all layers that are not committed; every rank calls it.

        Raises:
            LayersweepError: Whatever a user can cause: corrupt weights, a full disk, activations
                that are not finite.
        """
        committed = self._committed(reread=True)
        if OUTER not in committed:
            self._write_outer()
        last = max((s.layer for s in self.job.schedules if s.layer not in committed), default=-1)
        if LOSS not in committed and self.slots is not None:
            last = len(self.job.schedules) - 1  # the loss needs what leaves the last layer
        visited = [
            schedule
            for schedule in self.job.schedules[: last + 1]
            if self.slots is not None or schedule.layer not in committed
        ]
        requests = [self._requests(s, s.layer in committed) for s in visited]
        self.progress.layers = len(visited)
        with ReadAhead(requests, self._read) as ahead:
            for schedule in visited:
                self._visit(schedule, ahead, redo=schedule.layer not in committed)

    def measure_loss(self, sequences: int) -> None:
        """Measures the BF16 next-token loss after the last layer, and records it."""
        assert self.store is not None
        if LOSS in self._committed():
            return
        architecture, stored = self.job.architecture, self.job.stored
        head = "lm_head.weight"
        if architecture.tie_word_embeddings:
            head = "backbone.embeddings.weight"
        loss = next_token_loss(
            self.store,
            self.source.read(stored["backbone.norm_f.weight"].name),
            self.source.read(stored[head].name),
            architecture.layer_norm_epsilon,
            sequences=sequences,
            ranks=self.ranks,
        )
        refuse_nonfinite_loss(loss)  # before it is recorded: a restart measures again
        unigrams = unigram_loss(self.store.token_ids, architecture.vocab_size, sequences)
        self.journal.write_part(LOSS, self._part, [], {})
        self._commit(LOSS, {"loss": loss, "unigram_loss": unigrams})

    def _committed(self, *, reread: bool = False) -> set[int | str]:
        """Units that an earlier run committed; all ranks agree.

        Args:
            reread: Also compare checksums, the ranks taking turns at the units.
        """
        found: list[int | str] = []
        if self.ranks.rank == 0:
            units: list[int | str] = [OUTER, LOSS, *(s.layer for s in self.job.schedules)]
            for unit in units:
                if self.journal.committed(unit) is None:
                    self.journal.discard(unit)
                else:
                    found.append(unit)
        found = broadcast_object(found, self.ranks.world)
        if not reread:
            return set(found)
        mine = found[self.ranks.rank :: self.ranks.size]
        damaged = [u for u in mine if self.journal.committed(u, checksums=True) is None]
        everyone = gather_objects(damaged, self.ranks.world)
        lost = set(broadcast_object([u for units in everyone for u in units], self.ranks.world))
        if self.ranks.rank == 0:
            for unit in lost:
                logger.warning("%s: damaged since it was committed; it is done again", unit)
                self.journal.discard(unit)
        return set(found) - lost

    def _write_outer(self) -> None:
        """Copies this rank's share of the tensors outside the layers."""
        mine = [name for name, rank in self.job.outer if rank == self.ranks.rank]
        files: list[FileRecord] = []
        sizes = [self.job.stored[name].nbytes for name in mine]
        groups = split_by_size(mine, sizes, self.settings.max_shard_bytes)
        for number, names in enumerate(groups):
            path = self.files / f"{OUTER}-{number:03d}-rank-{self.ranks.rank:05d}.safetensors"
            files.append(write_safetensors(path, dict(map(self._copy, names))))
        self.journal.write_part(OUTER, self._part, files, {})
        self._commit(OUTER, {})

    def _visit(self, schedule: LayerSchedule, ahead: ReadAhead, *, redo: bool) -> None:
        seconds: dict[str, float] = defaultdict(float)
        with _timed(seconds, "read"):
            shards = ahead.take()
        slot = None if self.slots is None else self.slots[schedule.layer_type]
        with _timed(seconds, "fill"):
            if slot is not None:
                slot.fill(schedule.layer, _lookup(shards))
                shards.clear()  # the slot has them now; only the next layer's wait in memory
        if redo:
            self._pack_and_write(schedule, slot, shards, seconds)
        statistics: dict[str, object] = {}
        if slot is not None and self.store is not None:
            statistics = self._forward(schedule, slot, seconds, observe=redo)
        if redo:
            statistics["seconds"] = dict(seconds)
            self._commit(schedule.layer, statistics)
        self.progress.layer_done(
            schedule.layer,
            schedule.layer_type,
            phase="calibrate" if redo else "pass through",
            experts=_coverage(statistics),
            seconds=dict(seconds),
            input_amax=statistics.get("amax", {}),
        )

    def _pack_and_write(
        self,
        schedule: LayerSchedule,
        slot: LayerSlot | None,
        shards: Mapping[str, torch.Tensor],
        seconds: dict[str, float],
    ) -> None:
        weights: LayerWeights
        if slot is not None:
            weights = SlotWeights(slot)
        else:
            local = self.job.architecture.n_routed_experts // self.job.dims.ep
            first = local * self.job.dims.coordinates(self.ranks.rank).ep_rank
            weights = StreamedWeights(schedule.layer, first, shards, self.ranks.device)
        with _timed(seconds, "pack"):
            packed = self.packer.pack(schedule, weights)
        with _timed(seconds, "write"):
            tensors: dict[str, Writable] = dict(packed.tensors)
            for spec, rank in schedule.copies:
                if rank == self.ranks.rank:
                    name, tensor = self._copy(spec.name)
                    tensors[name] = tensor
            files = []
            if tensors:
                name = f"layer-{schedule.layer:05d}-rank-{self.ranks.rank:05d}.safetensors"
                files.append(write_safetensors(self.files / name, tensors))
            part = {"packed": packed.statistics}
            self.journal.write_part(schedule.layer, self._part, files, part)

    def _forward(
        self, schedule: LayerSchedule, slot: LayerSlot, seconds: dict[str, float], *, observe: bool
    ) -> dict[str, object]:
        """Moves the hidden states on; returns what was seen, reduced over all ranks."""
        assert self.store is not None
        is_moe = schedule.layer_type is LayerType.moe
        experts = self.job.architecture.n_routed_experts if is_moe else 0
        observer = LayerObserver(schedule.observed, experts, self.ranks.device)

        def layer(batch: MicroBatch) -> torch.Tensor:
            observer.begin_batch(batch.weights, batch.hidden.shape[0])
            return slot.forward(batch.hidden, observer if observe else None)

        with _timed(seconds, "forward"):
            self.store.update(layer)
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
        if not observe:
            return {}
        with _timed(seconds, "reduce"):
            statistics = observer.statistics()
            reduced = reduce_statistics(statistics, self.ranks.world)
            refuse_nonfinite(statistics, reduced, schedule.layer, self.ranks)
        tokens = reduced.pop("tokens_per_expert", None)
        return {
            "amax": {name: float(value) for name, value in reduced.items()},
            "tokens": self.store.tokens,
            "tokens_per_expert": [] if tokens is None else [round(n) for n in tokens.tolist()],
        }

    def _commit(self, unit: int | str, statistics: dict[str, object]) -> None:
        """Declares a unit whole, once every rank has written its part; rank 0 does it.

        No rank goes on before, so that a restart never has more than one layer to pack again.
        """
        barrier(self.ranks.world)
        if self.ranks.rank == 0:
            self._write_marker(unit, statistics)
        barrier(self.ranks.world)

    def _write_marker(self, unit: int | str, statistics: dict[str, object]) -> None:
        if isinstance(unit, int):
            amax = statistics.get("amax", {})
            assert isinstance(amax, dict)
            statistics["scalars"] = choose_scalars(
                self.job.schedules[unit],
                {name: torch.tensor([value]) for name, value in amax.items()},
                self.job.architecture.n_routed_experts,
                clamp_kv_scales=self.settings.clamp_kv_scales,
                unobserved_input_scale=self.settings.unobserved_input_scale,
            )
        self.journal.write_part(unit, SCALARS, [], statistics)
        parts = [f"rank{rank:05d}" for rank in range(self.ranks.size)]
        self.journal.commit(unit, [*parts, SCALARS])

    def _requests(self, schedule: LayerSchedule, is_committed: bool) -> list[Request]:
        """What this rank reads of one layer: all its shards, or only those that it packs."""
        dims, rank = self.job.dims, self.ranks.rank
        at = dims.coordinates(rank)
        local = max(self.job.architecture.n_routed_experts // dims.ep, 1)
        packed = {item.spec.name for item in schedule.dense if item.replica == at.dp_rank}
        requests = []
        for spec in layer_tensors(self.job.architecture, schedule.layer):
            shard = shard_of(spec, self.job.architecture, dims, rank)
            if shard is None:
                continue
            if self.slots is None:
                if spec.is_routed_expert:
                    projection = spec.module.rpartition(".")[2]
                    if projection not in schedule.experts:
                        continue
                    if not packs_expert(spec.expert % local, at, dims):
                        continue
                elif spec.name not in packed:
                    continue
            requests.append((spec, shard))
        assert not (is_committed and self.slots is None)
        return requests

    def _read(self, spec: TensorSpec, shard: Shard) -> torch.Tensor:
        tensor = self.source.read(self.job.stored[spec.name].name, shard)
        if self.settings.cast and spec.is_linear_weight:
            tensor = tensor.bfloat16()
        return tensor

    def _copy(self, name: str) -> tuple[str, Writable]:
        """A tensor that keeps the source's bytes, under the name that it has there."""
        source_name = self.job.stored[name].name
        return source_name, take_copy(self.source, source_name, self.ranks.rank)

    @property
    def _part(self) -> str:
        return f"rank{self.ranks.rank:05d}"


def _lookup(shards: Mapping[str, torch.Tensor]) -> Callable[[TensorSpec, Shard], torch.Tensor]:
    return lambda spec, _shard: shards[spec.name]


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[phase] += time.monotonic() - start


def _coverage(statistics: Mapping[str, object]) -> str:
    tokens = statistics.get("tokens_per_expert")
    if not isinstance(tokens, list) or not tokens:
        return ""
    return f", experts seen {sum(n > 0 for n in tokens)}/{len(tokens)}"
