"""Committing layers: when a layer's statistics are known and its files are durable on every rank.

In: layers that were visited, with futures of their files. Out: units in the journal, progress lines
and metrics. On a GPU a layer is settled while the next ones compute, so that the device never waits
for a disk; on a CPU every layer is settled before the next one begins.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from pipeline.calibration.choose import choose_scalars
from pipeline.calibration.observers import Statistic
from pipeline.calibration.reduce import ReducedStatistics, refuse_nonfinite
from pipeline.checkpoint.journal import SCALARS, Journal
from pipeline.checkpoint.read_record import ReadRecord
from pipeline.checkpoint.writer import FileRecord
from pipeline.job import Job
from pipeline.packing import LayerPacking
from pipeline.runtime.collectives import Ranks, barrier
from pipeline.runtime.lanes import Mark
from pipeline.runtime.life import Life, Phase
from pipeline.runtime.progress import Progress
from pipeline.schedule import LayerSchedule

READ = "read"
"""Key of a part's statistics: digests of the shards that its layer was packed from."""

LAYERS_IN_FLIGHT = 2
"""Layers on a GPU whose files may still be on their way while a later one computes."""


@dataclasses.dataclass
class LayerRun:
    """A layer that was visited, on its way to being committed.

    Attributes:
        schedule: What became of it.
        redo: Whether it was packed; False for a layer that an earlier run committed.
        begun: When its turn came.
        filled: When its weights were there.
        ended: When its last micro-batch was computed.
        packing: Its weight statistics; None where nothing was packed.
        files: This rank's shard files.
        observed: This rank's activation statistics.
        reduced: Those of all ranks; None without a forward pass.
        bytes_read: Of its weights, by this rank.
        read_wait_s: Seconds that this thread waited for the source.
        write_wait_s: Seconds that it waited for room in host buffers, or for files.
    """

    schedule: LayerSchedule
    redo: bool
    begun: Mark
    filled: Mark
    ended: Mark
    packing: LayerPacking | None = None
    files: Sequence[Future[FileRecord]] = ()
    observed: Sequence[Statistic] = ()
    reduced: ReducedStatistics | None = None
    bytes_read: int = 0
    read_wait_s: float = 0.0
    write_wait_s: float = 0.0

    def seconds(self) -> dict[str, float]:
        """Where the layer's time went; waiting for the source shows on the device or here."""
        stall = max(self.begun.seconds_until(self.filled), self.read_wait_s)
        return {
            "read stall": stall,
            "compute": self.filled.seconds_until(self.ended),
            "write stall": self.write_wait_s,
        }


@dataclasses.dataclass(frozen=True)
class ScalarSettings:
    """How activation scalars are chosen.

    Attributes:
        clamp_kv_scales: Whether a KV scale is never below 1.0.
        unobserved_input_scale: Scale of a projection that no token reached; None refuses it.
    """

    clamp_kv_scales: bool
    unobserved_input_scale: float | None


@dataclasses.dataclass
class _Settled:
    run: LayerRun
    summary: dict[str, object]
    packed: dict[str, tuple[float, ...]]


class Commits:
    """Settles and commits layers in order; every rank makes the same calls.

    Attributes:
        scalars: Activation scalars by tensor name, of every layer that was looked at.
        through: The last layer that is committed; -1 before the first.

    Args:
        job: What was decided.
        journal: Where units are recorded.
        ranks: Groups for collectives.
        scalars: How activation scalars are chosen.
        progress: Speaks to the user.
        tokens: Calibration tokens that pass through every layer.
        life: Told where this rank is.
        reads: Digests of what this rank has read of the source; None for made-up weights.
    """

    def __init__(
        self,
        job: Job,
        journal: Journal,
        ranks: Ranks,
        scalars: ScalarSettings,
        progress: Progress,
        tokens: int,
        life: Life | None = None,
        reads: ReadRecord | None = None,
    ) -> None:
        self._job, self._journal, self._ranks = job, journal, ranks
        self._scalars, self._progress, self._tokens = scalars, progress, tokens
        self._life, self._reads = life or Life(), reads
        self._is_async = ranks.device.type == "cuda"
        self.scalars: dict[int, dict[str, float]] = {}
        self.through = -1
        self._new: deque[LayerRun] = deque()
        self._settled: deque[_Settled] = deque()
        self._outer: list[Future[FileRecord]] | None = None

    def add_outer(self, unit: str, files: list[Future[FileRecord]]) -> None:
        """Takes the files of the tensors outside the layers."""
        self._outer_unit, self._outer = unit, files
        if not self._is_async:
            self._commit_outer()

    def add(self, run: LayerRun) -> None:
        """Takes a layer whose work was all enqueued."""
        self._new.append(run)
        if not self._is_async:
            self.settle(keep=0)

    def settle(self, keep: int = LAYERS_IN_FLIGHT) -> None:
        """Looks at what came in since the last call; commits all but the last `keep` layers.

        Raises:
            NumericsError: Weights or activations that are not finite.
            OutputError: A file could not be written.
        """
        for file in self._outer or ():
            if file.done():
                file.result()  # what went wrong outside the layers is said now, not at the end
        while self._new:
            run = self._new.popleft()
            with self._life.during(Phase.forward, run.schedule.layer):
                self._settled.append(self._look_at(run))
        while len(self._settled) > keep:
            settled = self._settled.popleft()
            with self._life.during(Phase.commit, settled.run.schedule.layer):
                self._commit_layer(settled)

    def drain(self) -> None:
        """Commits everything."""
        self.settle(keep=0)
        if self._outer is not None:
            with self._life.during(Phase.commit):
                self._commit_outer()

    def commit(self, unit: int | str, statistics: dict[str, object]) -> None:
        """Declares a unit whole, once every rank has written its part; rank 0 does it."""
        self._wait(unit)
        if self._ranks.rank == 0:
            self._journal.write_part(unit, SCALARS, [], statistics)
            parts = [f"rank{rank:05d}" for rank in range(self._ranks.size)]
            self._journal.commit(unit, [*parts, SCALARS])
        self._wait(unit)

    def write_part(
        self, unit: int | str, files: Sequence[FileRecord], statistics: dict[str, object]
    ) -> None:
        """Records this rank's part of a unit."""
        self._journal.write_part(unit, f"rank{self._ranks.rank:05d}", files, statistics)

    def _wait(self, unit: int | str) -> None:
        with self._life.during(Phase.wait, unit if isinstance(unit, int) else None):
            barrier(self._ranks.world)

    def _look_at(self, run: LayerRun) -> _Settled:
        """Waits for a layer's statistics, and refuses what is not finite."""
        packed = run.packing.finish() if run.packing is not None else {}
        run.ended.synchronize()
        summary: dict[str, object] = {}
        if run.reduced is not None:
            reduced = run.reduced.values()
            if not all(bool(values.isfinite().all()) for values in reduced.values()):
                for file in run.files:
                    file.result()  # a copied weight that is at fault is named here
            refuse_nonfinite(list(run.observed), reduced, run.schedule.layer, self._ranks)
            tokens = reduced.pop("tokens_per_expert", None)
            self.scalars[run.schedule.layer] = self._choose_scalars(run.schedule.layer, reduced)
            summary = {
                "amax": {name: float(value) for name, value in reduced.items()},
                "tokens": self._tokens,
                "tokens_per_expert": [] if tokens is None else [round(n) for n in tokens.tolist()],
            }
        return _Settled(run, summary, packed)

    def _commit_layer(self, settled: _Settled) -> None:
        run, layer = settled.run, settled.run.schedule.layer
        written = 0
        if run.redo:
            start = time.monotonic()
            files = [file.result() for file in run.files]
            run.write_wait_s += time.monotonic() - start
            written = sum(file.bytes for file in files)
            read = {} if self._reads is None else self._reads.of_layer(layer)
            self.write_part(layer, files, {"packed": settled.packed, READ: read})
            settled.summary["seconds"] = run.seconds()
            if self._ranks.rank == 0:
                settled.summary["scalars"] = self.scalars.get(layer, {})
            self.commit(layer, settled.summary)
        self.through = layer
        self._progress.layer_done(
            layer,
            run.schedule.layer_type,
            phase="calibrate" if run.redo else "pass through",
            experts=coverage(settled.summary),
            seconds=run.seconds(),
            bytes_read=run.bytes_read,
            bytes_written=written,
            input_amax=settled.summary.get("amax", {}),
        )
        self._life.layer_done(layer, self._progress.figures)

    def _choose_scalars(self, layer: int, amax: dict[str, torch.Tensor]) -> dict[str, float]:
        return choose_scalars(
            self._job.schedules[layer],
            {name: values.float() for name, values in amax.items()},
            self._job.architecture.n_routed_experts,
            clamp_kv_scales=self._scalars.clamp_kv_scales,
            unobserved_input_scale=self._scalars.unobserved_input_scale,
        )

    def _commit_outer(self) -> None:
        assert self._outer is not None
        files = [file.result() for file in self._outer]
        read = {} if self._reads is None else self._reads.of_outside()
        self.write_part(self._outer_unit, files, {READ: read})
        self.commit(self._outer_unit, {})
        self._outer = None


def coverage(statistics: dict[str, object]) -> str:
    """How many experts saw a token, for the progress line."""
    tokens = statistics.get("tokens_per_expert")
    if not isinstance(tokens, list) or not tokens:
        return ""
    return f", experts seen {sum(n > 0 for n in tokens)}/{len(tokens)}"
