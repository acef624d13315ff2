"""The sweep: visit every layer once; read, choose and pack, forward, reduce, commit.

In: a job, the source, a journal, and (for recipes that calibrate activations) slots and the
hidden store. Out: shard files and committed layers; `pipeline.calibrate` publishes them. Of the
committed layers of an earlier run, those behind its newest snapshot (`snapshots`) are only passed
through, so that the next ones get their inputs; those before it are not visited.

Reading runs ahead on a lane of its own (`filling`), packing beside the forward pass on another one,
and files are written in the background (`outbox`): the layers' arithmetic is all that takes time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pipeline.architecture import LayerType
from pipeline.calibration.hidden import HiddenStore
from pipeline.calibration.loss import next_token_loss, refuse_nonfinite_loss, unigram_loss
from pipeline.checkpoint.journal import Journal, LayerRecord
from pipeline.checkpoint.passthrough import take_copy
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.staging import StagingRing
from pipeline.checkpoint.writer import FileRecord, ShardWriter, Writable
from pipeline.commits import READ, Commits, ScalarSettings
from pipeline.errors import StoppedError
from pipeline.evaluation.in_sweep import InSweep
from pipeline.filling import SlotFiller
from pipeline.job import Job
from pipeline.outbox import Outbox
from pipeline.packing import LayerPacker
from pipeline.reading import Reading, make_feed, read_head, requests_of
from pipeline.report.run_json import finite
from pipeline.runtime.collectives import Ranks, broadcast_object, gather_objects
from pipeline.runtime.lanes import Lane
from pipeline.runtime.life import Life, Phase
from pipeline.runtime.progress import Progress
from pipeline.runtime.stop import Stop
from pipeline.schedule import LayerSchedule, split_by_size
from pipeline.snapshots import Snapshots
from pipeline.visit import Visit
from pipeline.weights import Buffers, LayerSlot, Loadable

__all__ = ["EVALUATION", "LOSS", "OUTER", "Sweep", "SweepSettings"]

logger = logging.getLogger(__name__)

OUTER = "outer"
LOSS = "loss"
EVALUATION = "evaluation"


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """What the sweep does with every layer alike.

    Attributes:
        scalars: How activation scalars are chosen.
        max_shard_bytes: Largest file, single tensors (or a block of experts) excepted.
        reading: How the source is read.
        discard: Count and checksum what would be written, and write nothing.
        write_threads: Files that are written at a time.
    """

    scalars: ScalarSettings
    max_shard_bytes: int
    reading: Reading
    discard: bool = False
    write_threads: int = 1


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
        staging: Host memory that packed tensors pass through; None on a CPU.
        evaluation: Measures what the layers cost; None where nobody asked.
        life: Told where this rank is.
        stop: Asked after each layer whether to go on.
        telling: Around what runs beside threads that are waited for: tells what is raised at once.
        snapshots: Keeps the hidden states for a restart; None without a forward pass.
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
    staging: StagingRing | None = None
    evaluation: InSweep | None = None
    life: Life = dataclasses.field(default_factory=Life)
    stop: Stop = dataclasses.field(default_factory=Stop)
    telling: Callable[[], AbstractContextManager[None]] = nullcontext
    snapshots: Snapshots | None = None

    def __post_init__(self) -> None:
        """The lane of packing, and what is on its way to the journal."""
        self.lane = Lane(self.ranks.device)
        tokens = self.store.tokens if self.store is not None else 0
        self.commits = Commits(
            self.job,
            self.journal,
            self.ranks,
            self.settings.scalars,
            self.progress,
            tokens,
            self.life,
            self.source.reads,
        )

    def run(self) -> None:
        """Sweeps over all layers that are not committed; every rank calls it.

        Raises:
            LayersweepError: Whatever a user can cause: corrupt weights, a full disk, activations
                that are not finite.
        """
        committed = self._committed(reread=True)
        visited = self._to_visit(committed)
        self._expect_reads(committed, visited)
        recorded = self._recorded_scalars(committed) if self.evaluation is not None else {}
        self.progress.layers = self.life.layers = len(visited)
        self.life.todo = [s.layer for s in visited if s.layer not in committed]
        settings = self.settings
        with (
            self.snapshots or nullcontext(),
            ShardWriter(
                self.files, threads=settings.write_threads, discard=settings.discard
            ) as writer,
        ):
            if OUTER not in committed:
                self.commits.add_outer(OUTER, self._write_outer(writer))
            slots: Mapping[LayerType, Loadable] = self.slots or self._buffers()
            requests = [
                requests_of(self.job, schedule, self.ranks.rank, all_shards=self.slots is not None)
                for schedule in visited
            ]
            feed = make_feed(self.source, requests, self.ranks.device, settings.reading)
            filling = SlotFiller(visited, requests, slots, feed, self.ranks.device)
            with filling as filler, self.telling():
                for schedule in visited:
                    visit = Visit(
                        schedule,
                        self.ranks,
                        self.packer,
                        self.commits,
                        self.lane,
                        self.life,
                        filler=filler,
                        writer=writer,
                        staging=self.staging,
                        slot=None if self.slots is None else self.slots[schedule.layer_type],
                        store=self.store,
                        copies=self._copies_of(schedule),
                        max_shard_bytes=settings.max_shard_bytes,
                        evaluation=self.evaluation,
                        recorded_scalars=recorded.get(schedule.layer, {}),
                    )
                    visit.run(redo=schedule.layer not in committed)
                    self._after_layer(schedule, is_last=schedule is visited[-1])
                self.commits.drain()

    def measure(self, loss_sequences: int) -> None:
        """Measures, after the last layer, the BF16 next-token loss and what the layers cost.

        Args:
            loss_sequences: Calibration sequences on which the loss is measured.
        """
        assert self.store is not None
        self.life.enter(Phase.evaluate)
        committed = self._committed()
        if LOSS in committed and (self.evaluation is None or EVALUATION in committed):
            return
        head = read_head(self.job, self.source).to(self.ranks.device)
        if LOSS not in committed:
            loss = next_token_loss(
                self.store,
                head.norm_weight,
                head.weight,
                head.epsilon,
                sequences=loss_sequences,
                ranks=self.ranks,
            )
            refuse_nonfinite_loss(loss)  # before it is recorded: a restart measures again
            vocab = self.job.architecture.vocab_size
            unigrams = unigram_loss(self.store.token_ids, vocab, loss_sequences)
            self.commits.write_part(LOSS, [], {})
            self.commits.commit(LOSS, {"loss": loss, "unigram_loss": unigrams})
        if self.evaluation is not None and EVALUATION not in committed:
            report = finite(dataclasses.asdict(self.evaluation.finish(head)))
            self.commits.write_part(EVALUATION, [], {})
            self.commits.commit(EVALUATION, {"key": self.evaluation.key, "report": report})

    def _to_visit(self, committed: set[int | str]) -> Sequence[LayerSchedule]:
        """The layers whose turn comes; what a snapshot holds need not be computed; a collective."""
        schedules = self.job.schedules
        left = [schedule for schedule in schedules if schedule.layer not in committed]
        if self.slots is None:
            return left
        at_the_end = {LOSS} if self.evaluation is None else {LOSS, EVALUATION}
        if at_the_end - committed:
            left = [schedules[-1]]  # they need what leaves the last layer
        if not left:
            return []
        first = 0
        if self.snapshots is not None:
            with self.life.during(Phase.read):
                first = self.snapshots.restore(committed) + 1
        return schedules[first : left[-1].layer + 1]

    def _after_layer(self, schedule: LayerSchedule, *, is_last: bool) -> None:
        """Takes a snapshot if it is time; whether to go on; a collective."""
        with self.life.during(Phase.wait, schedule.layer):
            stopping = self.stop.agreed(schedule.layer)
        if is_last:  # little is left to do
            return
        if stopping:
            self.commits.drain()
        if self.snapshots is not None:
            with self.life.during(Phase.commit, schedule.layer):
                self.snapshots.after_layer(
                    schedule.layer, now=stopping, committed=self.commits.through
                )
        if stopping:
            raise StoppedError(schedule.layer, self.stop.reason.value)

    def _is_ours(self, evaluation: LayerRecord) -> bool:
        """Whether an earlier run measured on the same text."""
        if self.evaluation is None:
            return True
        return bool(evaluation.summary["key"] == self.evaluation.key)

    def _expect_reads(self, committed: set[int | str], visited: Sequence[LayerSchedule]) -> None:
        """Tells all ranks what committed units were packed from, where they are read again."""
        units = [OUTER, *(schedule.layer for schedule in visited)]
        expected: dict[str, str] = {}
        for unit in units if self.ranks.rank == 0 else ():
            record = self.journal.committed(unit) if unit in committed else None
            for part in record.parts if record is not None else ():
                read = part.statistics.get(READ)
                expected |= read if isinstance(read, dict) else {}
        expected = broadcast_object(expected, self.ranks.world)
        if self.source.reads is not None:
            self.source.reads.expect(expected)

    def _recorded_scalars(self, committed: set[int | str]) -> dict[int, dict[str, float]]:
        """The activation scalars of the layers that an earlier run committed, on every rank."""
        found: dict[int, dict[str, float]] = {}
        if self.ranks.rank == 0:
            for schedule in self.job.schedules:
                record = self.journal.committed(schedule.layer)
                if schedule.layer in committed and record is not None:
                    found[schedule.layer] = dict(record.summary.get("scalars", {}))
        told_all: dict[int, dict[str, float]] = broadcast_object(found, self.ranks.world)
        return told_all

    def _copies_of(self, schedule: LayerSchedule) -> dict[str, Writable]:
        """This rank's tensors of a layer that keep the source's bytes, by their name there."""
        mine = (spec.name for spec, rank in schedule.copies if rank == self.ranks.rank)
        return dict(map(self._copy, mine))

    def _committed(self, *, reread: bool = False) -> set[int | str]:
        """Units that an earlier run committed; all ranks agree.

        Args:
            reread: Also compare checksums, the ranks taking turns at the units.
        """
        found: list[int | str] = []
        if self.ranks.rank == 0:
            units: list[int | str] = [
                OUTER,
                LOSS,
                EVALUATION,
                *(s.layer for s in self.job.schedules),
            ]
            for unit in units:
                record = self.journal.committed(unit)
                if record is None or (unit == EVALUATION and not self._is_ours(record)):
                    self.journal.discard(unit)
                else:
                    found.append(unit)
        with self.life.during(Phase.wait):
            found = broadcast_object(found, self.ranks.world)
        if not reread:
            return set(found)
        mine = found[self.ranks.rank :: self.ranks.size]
        damaged = [u for u in mine if self.journal.committed(u, checksums=True) is None]
        with self.life.during(Phase.wait):
            everyone = gather_objects(damaged, self.ranks.world)
            damaged = [unit for units in everyone for unit in units]
            lost = set(broadcast_object(damaged, self.ranks.world))
        if self.ranks.rank == 0:
            for unit in lost:
                logger.warning("%s: damaged since it was committed; it is done again", unit)
                self.journal.discard(unit)
        return set(found) - lost

    def _write_outer(self, writer: ShardWriter) -> list[Future[FileRecord]]:
        """Copies this rank's share of the tensors outside the layers, in the background."""
        mine = [name for name, rank in self.job.outer if rank == self.ranks.rank]
        sizes = [self.job.stored[name].nbytes for name in mine]
        limit = self.settings.max_shard_bytes
        groups = split_by_size(mine, sizes, limit)
        files = []
        for number, names in enumerate(groups):
            name = f"{OUTER}-{number:03d}-rank-{self.ranks.rank:05d}"
            copies = dict(map(self._copy, names))
            device = self.ranks.device
            files += Outbox(writer, name, [], copies, None, device, limit=limit).finish()
        return files

    def _buffers(self) -> dict[LayerType, Buffers]:
        """Where weights lie without a forward pass."""
        local = self.job.architecture.n_routed_experts // self.job.dims.ep
        first = local * self.job.dims.coordinates(self.ranks.rank).ep_rank
        kinds = dict.fromkeys(schedule.layer_type for schedule in self.job.schedules)
        return {kind: Buffers(first, self.ranks.device) for kind in kinds}

    def _copy(self, name: str) -> tuple[str, Writable]:
        """A tensor that keeps the source's bytes, under the name that it has there."""
        source_name = self.job.stored[name].name
        return source_name, take_copy(self.source, source_name, self.ranks.rank)
