"""Snapshots of the hidden states, so that a restart need not pass through committed layers again.

In: what a layer hands on to the next one: the calibration's hidden states, the evaluation's streams
and what they have added up. Out: files in WORK/snapshots; on a restart the same tensors, bit for
bit, and the layer after which they were taken. Layers up to there are neither read nor computed.

A snapshot counts once every rank's file and the marker are durable and its layer is committed. All
ranks begin, complete, restore or drop it together. Whatever is wrong with one, on a disk that is
full or with bytes that have changed, costs a warning and time, never the run.

What it costs: the device is waited for once; then the files are written beside the next layers,
which wait for what they would overwrite (`checkpoint/snapshot_writer`). No device memory, 16 MiB of
pinned and 128 MiB of other host memory per rank. On a restart a rank's part lies in host memory as
a whole until it is in its place. On a CPU nothing runs beside: the sweep waits for the files.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pipeline.calibration.hidden import HiddenStore
from pipeline.checkpoint.journal import differences
from pipeline.checkpoint.snapshot_files import (
    SnapshotFile,
    SnapshotFiles,
    SnapshotRecord,
    file_name,
    load,
)
from pipeline.checkpoint.snapshot_writer import SnapshotWriter
from pipeline.config_parts import SnapshotConfig
from pipeline.errors import OutputError
from pipeline.evaluation.groups import groups_of
from pipeline.evaluation.in_sweep import InSweep, below
from pipeline.evaluation.records import ServingMode
from pipeline.job import Job
from pipeline.memory import MemoryWish
from pipeline.runtime.collectives import (
    Ranks,
    barrier,
    broadcast_object,
    gather_objects,
    reduce_max,
)
from pipeline.runtime.lanes import Mark
from pipeline.schedule import LayerSchedule

logger = logging.getLogger(__name__)

_HIDDEN, _EVALUATION = "hidden.", "evaluation."


class Snapshots:
    """Takes and restores snapshots; a context manager, in which every rank makes the same calls.

    Args:
        directory: Where they lie.
        key: What makes hidden states valid, as plain values; that of rank 0 counts.
        ranks: All ranks.
        options: When one is taken, and how many are kept.
        store: The calibration's hidden states.
        evaluation: Its streams; None where nobody asked.
        schedules: Of all layers.
        unwritten: Bytes that the run has still to write to the same file system; rank 0 asks.
        in_background: Whether files are written beside the next layers.
        clock: Seconds; rank 0's decides, so that nobody's wall clock matters.
    """

    def __init__(
        self,
        directory: Path,
        key: Mapping[str, Any],
        ranks: Ranks,
        options: SnapshotConfig,
        store: HiddenStore,
        evaluation: InSweep | None,
        schedules: Sequence[LayerSchedule],
        *,
        unwritten: Callable[[], int] = lambda: 0,
        in_background: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files, self._key = SnapshotFiles(directory), json.loads(json.dumps(key))
        self._ranks, self._options, self._schedules = ranks, options, schedules
        self._store, self._evaluation = store, evaluation
        self._unwritten, self._clock = unwritten, clock
        self._in_background = in_background
        self._layer, self._time = -1, clock()  # of the last one that was begun
        self._writer: SnapshotWriter | None = None

    def __enter__(self) -> Snapshots:
        """The same."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives up what is on its way; it has no marker, so the next start removes it."""
        if self._writer is not None:
            self._writer.give_up()
            self._writer = None

    def restore(self, committed: Collection[int | str]) -> int:
        """Puts the newest usable snapshot in place; returns its layer, or -1; a collective.

        Args:
            committed: Units that an earlier run committed. Snapshots beyond a layer that is not
                among them are removed: another layout may give that layer other scales, and the
                evaluation's streams have seen the old ones.
        """
        usable = self._usable(committed) if self._ranks.rank == 0 else []
        records: list[SnapshotRecord] = broadcast_object(usable, self._ranks.world)
        for record in records:
            state, fault = self._load(record)
            faults = [f for f in gather_objects(fault, self._ranks.world) if f]
            if not broadcast_object(faults, self._ranks.world):
                self._put_in_place(record.layer, state)
                return record.layer
            if self._ranks.rank == 0:
                logger.warning(
                    "the snapshot after layer %d is of no use: %s; %s",
                    record.layer,
                    "; ".join(faults),
                    "an older one is tried"
                    if record is not records[-1]
                    else "the layers up to there are passed through again",
                )
                self._files.remove(record.layer)
        self._time = self._clock()
        return -1

    def after_layer(self, layer: int, *, now: bool = False, committed: int) -> None:
        """Takes a snapshot if it is due, and completes one that was begun; a collective.

        Args:
            layer: That every rank has just visited, with another one to come.
            now: Take one in any case, and return when it is whole; the layer must be committed.
            committed: The last committed layer.
        """
        is_due = self._ranks.rank == 0 and self._is_due(layer, now=now)
        is_writing = self._writer is not None and not self._writer.is_done
        told = torch.tensor([float(is_due), float(is_writing)])
        due, writing = reduce_max(told, self._ranks.world).tolist()
        if self._writer is not None and self._writer.layer <= committed and (now or not writing):
            self._complete(self._writer)
        if due and self._writer is None:
            self._begin(layer)
            if now or not self._in_background:
                self.finish()

    def finish(self) -> None:
        """Completes what is on its way, once everything is committed; a collective."""
        if self._writer is not None:
            self._complete(self._writer)

    def _is_due(self, layer: int, *, now: bool) -> bool:
        layers, minutes = self._options.layers, self._options.minutes
        if layers is None and minutes is None:
            return False
        return (
            now
            or (layers is not None and layer - self._layer >= layers)
            or (minutes is not None and self._clock() - self._time >= 60 * minutes)
        )

    def _begin(self, layer: int) -> None:
        """Makes room for a snapshot and starts to write it, unless there is none."""
        self._layer, self._time = layer, self._clock()
        Mark(self._ranks.device).synchronize()
        state = self._state()
        fault = ""
        if self._ranks.rank == 0:
            fault = self._prepare(layer, sum(tensor.nbytes for tensor in state.values()))
        if broadcast_object(fault, self._ranks.world):
            return
        directory = self._files.of_layer(layer)
        writer = SnapshotWriter(layer, directory, self._ranks.rank, state, self._ranks.device)
        hidden = [name for name in state if name.startswith(_HIDDEN)]
        self._store.keep_until([writer.wait_for(name) for name in hidden])
        if self._evaluation is not None:
            self._evaluation.keep_until(writer.wait_for_all)
        self._writer = writer

    def _prepare(self, layer: int, nbytes: int) -> str:
        """Makes the directory, if there is room; says what is in the way."""
        try:
            self._files.begin(layer)
            free, needed = self._files.free_bytes(), nbytes * self._ranks.size
            unwritten = self._unwritten()
            if free >= needed + unwritten:
                return ""
            fault = (
                f"{self._files.directory} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB "
                f"are needed beside {unwritten / 1e9:.1f} GB of the checkpoint"
            )
        except (OutputError, OSError) as error:
            fault = _in_short(error)
        self._files.remove(layer)
        logger.warning("no snapshot after layer %d: %s", layer, fault)
        return fault

    def _complete(self, writer: SnapshotWriter) -> None:
        """Declares the snapshot whole if every rank's file is durable; else drops it."""
        self._writer = None
        part: tuple[SnapshotFile, float] | str
        try:
            part = writer.result()
        except OutputError as error:
            part = _in_short(error)
        parts = gather_objects(part, self._ranks.world)
        if self._ranks.rank == 0:
            faults = [part for part in parts if isinstance(part, str)]
            whole = [part for part in parts if not isinstance(part, str)]
            record = SnapshotRecord(writer.layer, self._key, tuple(file for file, _ in whole))
            try:
                if not faults:
                    self._files.commit(record)
                    self._remove_old()
            except (OutputError, OSError) as error:
                faults = [_in_short(error)]
            if faults:
                logger.warning("no snapshot after layer %d: %s", writer.layer, "; ".join(faults))
                self._files.remove(writer.layer)
            else:
                logger.info(
                    "snapshot after layer %d: %.1f GB on %d ranks in %.0f s",
                    writer.layer,
                    record.bytes / 1e9,
                    self._ranks.size,
                    max(seconds for _, seconds in whole),
                )
        barrier(self._ranks.world)  # nobody ends the run before the marker is there

    def _remove_old(self) -> None:
        """Those of another key count as the oldest."""
        records = sorted(self._files.found(), key=lambda r: (r.key == self._key, r.layer))
        for record in records[: -self._options.keep]:
            self._files.remove(record.layer)

    def _usable(self, committed: Collection[int | str]) -> list[SnapshotRecord]:
        """What may be restored, the newest first."""
        usable, others = [], []
        for record in self._files.found():
            if any(layer not in committed for layer in range(record.layer + 1)):
                self._files.remove(record.layer)
            elif changed := differences(record.key, self._key):
                others.append((record.layer, changed))
            else:
                usable.append(record)
        if others and not usable:
            layer, changed = others[0]
            logger.info(
                "the snapshot after layer %d cannot be used here, so the layers up to there are "
                "passed through again: %s",
                layer,
                "; ".join(changed),
            )
        return usable

    def _load(self, record: SnapshotRecord) -> tuple[dict[str, torch.Tensor], str]:
        """This rank's part, or what is wrong with it."""
        path = self._files.of_layer(record.layer) / file_name(self._ranks.rank)
        try:
            return load(path, record.files[self._ranks.rank]), ""
        except OutputError as error:
            return {}, _in_short(error)

    def _state(self) -> dict[str, torch.Tensor]:
        state = {f"{_HIDDEN}{name}": tensor for name, tensor in self._store.state().items()}
        if self._evaluation is not None:
            streams = self._evaluation.state()
            state |= {f"{_EVALUATION}{name}": tensor for name, tensor in streams.items()}
        return state

    def _put_in_place(self, layer: int, state: Mapping[str, torch.Tensor]) -> None:
        self._store.restore(below(_HIDDEN, state))
        if self._evaluation is not None:
            passed = self._schedules[: layer + 1]
            self._evaluation.restore(below(_EVALUATION, state), passed)
        if self._ranks.rank == 0:
            logger.info("going on from the snapshot after layer %d", layer)
        self._layer, self._time = layer, self._clock()


def planned_bytes(
    job: Job, *, tokens: tuple[int, int], compute_bytes: int, wish: MemoryWish, snapshots: int = 1
) -> int:
    """Bytes on the disk of some snapshots after the last layers, when they are largest.

    While one is written, `snapshots.keep` others are still there.

    Args:
        job: A job whose layout fits.
        tokens: Calibration sequences and their length; (0, 0) without a forward pass.
        compute_bytes: Bytes per element of the compute dtype.
        wish: What is evaluated.
        snapshots: How many.
    """
    if not tokens[0]:
        return 0
    dims, seq_len = job.dims, tokens[1]
    position = job.architecture.hidden_size * compute_bytes
    positions = math.ceil(tokens[0] / dims.dp) * (seq_len // dims.tp)
    if wish.evaluated:
        streams = 1 + len(ServingMode)
        positions += streams * math.ceil(wish.evaluated / dims.dp) * (seq_len // dims.tp)
        if wish.group_sequences:
            groups = sum(len(groups_of(schedule, job.architecture)) for schedule in job.schedules)
            share = math.ceil(min(wish.group_sequences, wish.evaluated) / dims.dp)
            length = min(max(wish.group_seq_len, dims.tp), seq_len) // dims.tp
            positions += (groups + 1) * share * length
    return snapshots * dims.world * positions * position


def _in_short(error: OutputError | OSError) -> str:
    """What and where, without the advice that goes with an end of the run."""
    return f"{error.what}: {error.value}" if isinstance(error, OutputError) else str(error)
