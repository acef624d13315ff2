"""One layer's turn: its slot is filled; forward and packing run side by side; then it is handed on.

In: a layer's schedule, the filler that brings its weights, the hidden store, the writer. Out: the
hidden states after the layer, a file on its way, and a `LayerRun` for the ledger. The calling
thread only enqueues work, and looks at earlier layers once the device has enough to do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from pipeline.architecture import LayerType
from pipeline.calibration.hidden import HiddenStore, MicroBatch
from pipeline.calibration.observers import LayerObserver
from pipeline.calibration.reduce import ReducedStatistics
from pipeline.checkpoint.staging import StagingRing
from pipeline.checkpoint.writer import ShardWriter, Writable
from pipeline.commits import Commits, LayerRun
from pipeline.evaluation.in_sweep import InSweep
from pipeline.filling import SlotFiller
from pipeline.outbox import Outbox
from pipeline.packing import LayerPacker, LayerPacking, PackedBlock
from pipeline.runtime.collectives import Ranks
from pipeline.runtime.lanes import Lane, Mark
from pipeline.runtime.life import Life, Phase
from pipeline.schedule import LayerSchedule
from pipeline.weights import Buffers, LayerSlot, LayerWeights, SlotWeights


@dataclasses.dataclass
class Visit:
    """One layer on one rank.

    Attributes:
        schedule: What becomes of the layer.
        ranks: Groups for collectives.
        packer: Chooses and packs.
        commits: The ledger.
        lane: Where packing is enqueued.
        life: Told where this rank is.
        filler: Brings the weights.
        writer: Writes the file.
        staging: Host memory for packed tensors; None on a CPU.
        slot: The layer's slot; None without a forward pass.
        store: The hidden store; None likewise.
        copies: This rank's tensors that keep the source's bytes.
        max_shard_bytes: Largest file.
        evaluation: Measures what the layer costs; None where nobody asked.
        recorded_scalars: The activation scalars of a layer that an earlier run committed.
    """

    schedule: LayerSchedule
    ranks: Ranks
    packer: LayerPacker
    commits: Commits
    lane: Lane
    life: Life
    filler: SlotFiller
    writer: ShardWriter
    staging: StagingRing | None
    slot: LayerSlot | None
    store: HiddenStore | None
    copies: Mapping[str, Writable]
    max_shard_bytes: int
    evaluation: InSweep | None = None
    recorded_scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    write_wait_s: float = 0.0

    def run(self, *, redo: bool) -> None:
        """Enqueues the layer's work; every rank calls it for every layer.

        Args:
            redo: Whether the layer is packed and observed; else it is only passed through.
        """
        begun = Mark(self.ranks.device)
        self.life.enter(Phase.read, self.schedule.layer)
        read_wait_s, bytes_read = self.filler.take()
        self.life.enter(Phase.forward, self.schedule.layer)
        run = LayerRun(self.schedule, redo, begun, Mark(self.ranks.device), begun)
        run.read_wait_s, run.bytes_read = read_wait_s, bytes_read
        steps = self._start_packing(run) if redo else iter(())
        settle_at = 0 if self.store is None else min(1, len(self.store.batches) - 1)

        def between(index: int) -> None:
            self.life.advance()
            # By now the device has work for a while: time to look at the layers before.
            if index == settle_at:
                self.commits.settle()
            if index >= settle_at:
                next(steps, None)

        if self.slot is not None and self.store is not None:
            self._forward(run, self.slot, self.store, between)
        else:
            between(settle_at)
        for _ in steps:
            pass
        with self.lane.use():
            packed = Mark(self.ranks.device)
        run.ended = packed if self.slot is None else Mark(self.ranks.device)
        run.write_wait_s = self.write_wait_s
        self.commits.add(run)
        used = [run.ended, packed]
        if self.slot is not None and self.evaluation is not None:
            with self.life.during(Phase.evaluate, self.schedule.layer):
                used.append(self._evaluate(run, self.slot, self.evaluation, packed))
        self.filler.release(self.schedule.layer_type, used)

    def _evaluate(self, run: LayerRun, slot: LayerSlot, evaluation: InSweep, packed: Mark) -> Mark:
        """What the layer costs, once its scalars are chosen and its weights are packed."""
        scalars = self.recorded_scalars
        if run.redo:
            self.commits.settle()  # waits for what was observed
            scalars = self.commits.scalars[self.schedule.layer]
        packed.block_stream()
        evaluation.visit(self.schedule, slot, scalars)
        return Mark(self.ranks.device)

    def _start_packing(self, run: LayerRun) -> Iterator[None]:
        weights: LayerWeights
        if self.slot is not None:
            weights = SlotWeights(self.slot)
        else:
            buffers = self.filler.slot(self.schedule.layer_type)
            assert isinstance(buffers, Buffers)
            weights = buffers
        run.packing = self.packer.begin(self.schedule, weights)
        return self._pack(run, run.packing)

    def _pack(self, run: LayerRun, packing: LayerPacking) -> Iterator[None]:
        """Packs step by step, on the packing lane, and hands over to the file."""
        blocks = packing.work.blocks
        outbox = None
        if blocks or self.copies:
            outbox = Outbox(
                self.writer,
                f"layer-{self.schedule.layer:05d}-rank-{self.ranks.rank:05d}",
                blocks,
                self.copies,
                self.staging,
                self.ranks.device,
                limit=self.max_shard_bytes,
            )
        with self.lane.use():
            run.filled.block_stream()
        steps = packing.steps()
        while True:
            packed: list[PackedBlock] | None
            with torch.inference_mode(), self.lane.use():
                packed = next(steps, None)
                if packed is None:
                    break
                if packed:
                    assert outbox is not None
                    start = time.monotonic()
                    outbox.send(packed)
                    if self.staging is not None:
                        self.write_wait_s += time.monotonic() - start
            yield
        if outbox is not None:
            run.files = outbox.finish()

    def _forward(
        self,
        run: LayerRun,
        slot: LayerSlot,
        store: HiddenStore,
        between: Callable[[int], None],
    ) -> None:
        """Moves the hidden states on, and reduces over all ranks what was seen."""
        experts = 0
        if self.schedule.layer_type is LayerType.moe:
            experts = self.packer.architecture.n_routed_experts
        observer = LayerObserver(self.schedule.observed, experts, self.ranks.device)

        def layer(batch: MicroBatch) -> torch.Tensor:
            observer.begin_batch(batch.weights, batch.hidden.shape[0])
            return slot.forward(batch.hidden, observer if run.redo else None)

        store.update(layer, between)
        if run.redo:
            run.observed = observer.statistics()
            run.reduced = ReducedStatistics(run.observed, self.ranks.world)
