"""Before anything long: whether every rank can do its part, and all of them the same.

In: what each rank has prepared. Out: nothing, or one error on all ranks, with everything that any
of them found, each thing once. The ranks meet at their store before they are connected, so a rank
that cannot even open the source is heard too, and no other waits for it.

    rank 0            other ranks
    makes a token     ... looks for it: do all hosts share the output's file system?
    looks around      looks around (software, options, source, room, memory, clock)
    hears all, judges
    answers           raises what rank 0 answers, if anything
"""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.checkpoint.publish import WorkDirectory
from pipeline.checkpoint.snapshot_files import unwritten_bytes
from pipeline.checkpoint.source import FileSource, Source
from pipeline.config import CalibrateConfig
from pipeline.errors import ClusterError, JointError, LayersweepError
from pipeline.memory import MemoryPlan, MemoryWish
from pipeline.preflight_facts import (
    Facts,
    code_digest,
    look_at_gpu,
    look_at_host_memory,
    look_at_room,
    settings_of,
    software,
    source_digest,
)
from pipeline.preflight_source import Extent, extents_of, extents_of_all, probe
from pipeline.preflight_verdict import Needs, clock_warnings, judge
from pipeline.preparation import Place, Prepared
from pipeline.runtime.endings import Status, describe
from pipeline.runtime.meeting import JOIN_S, Meeting, can_meet
from pipeline.runtime.peers import this_process
from pipeline.snapshots import planned_bytes

logger = logging.getLogger(__name__)

TOKEN_S = 20.0
"""For a file to be seen on another host: NFS believes what it knows of a directory for so long."""
BYTES_BESIDE_TENSOR = 512
"""Headers, index and journal: 113, 95 and about 200 bytes for each tensor of the demo model."""
TENSORS_OF_ONE = 4
"""What a quantized weight becomes: codes, two scales and its input's scale."""
SNAPSHOT_HOST_BYTES = 144 * 2**20
"""Of a rank that writes a snapshot (`pipeline/snapshots.py`)."""


class Preflight:
    """One rank's part in the meeting before the run; every rank makes the same calls.

    Args:
        place: This process among the ranks.
        conf_dir: Directory of the presets.
        join_s: How long rank 0, once ready, waits for the others.
        answer_s: How long the others wait for rank 0, which tokenizes first.
    """

    def __init__(
        self, place: Place, conf_dir: Path, *, join_s: float = JOIN_S, answer_s: float = 3600.0
    ) -> None:
        self._place, self._conf_dir = place, conf_dir
        self._join_s, self._answer_s = join_s, answer_s
        self._meeting: Meeting | None = None
        self._token: Path | None = None
        self._has_announced = False

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """What is refused inside is told to the other ranks, so that they do not wait.

        Raises:
            JointError: What all ranks have found; on a single rank, what was raised inside.
        """
        try:
            yield
        except JointError:
            raise
        except Exception as error:
            if self._place.world == 1 or not can_meet():
                raise
            _, cause, status = describe(error)
            text = str(error) if isinstance(error, LayersweepError) else cause
            try:
                self._meet(Facts(this_process(self._place.rank), refusal=text), Needs(), error)
            except ClusterError:
                pass  # there is nobody to tell
            except JointError:
                if status == Status.refused:
                    raise
            raise  # a fault, with its traceback

    def check_run(self, config: CalibrateConfig, prepared: Prepared) -> None:
        """Checks a calibration, before the ranks are connected.

        Raises:
            JointError: Some rank found something.
        """
        rank, work, source = self._place.rank, prepared.work, prepared.source
        with self.sharing():
            extents: Mapping[Path, Extent] = {}
            if isinstance(source, FileSource):
                extents = extents_of(prepared.job, source, rank)
            facts = self._look(config, source, extents, prepared)
            facts = dataclasses.replace(
                facts,
                sees_token=self._look_for_token(work),
                room=None if work.is_rehearsal else look_at_room(work.root),
            )
            needs = Needs()
            if rank == 0 and not work.is_rehearsal:
                needs = needs_of(config, prepared)
        self._meet(facts, needs)

    def check_reading(
        self, config: Any, sources: Sequence[Source], prepared: Prepared | None = None
    ) -> None:
        """Checks a job that writes no checkpoint: software, options, what is read, memory.

        Raises:
            JointError: Some rank found something.
        """
        with self.sharing():
            extents: dict[Path, Extent] = {}
            for source in sources:
                extents |= extents_of_all(source) if isinstance(source, FileSource) else {}
            facts = self._look(config, sources[0], extents, prepared)
        self._meet(facts, Needs())

    def _look(
        self,
        config: Any,
        source: Source,
        extents: Mapping[Path, Extent],
        prepared: Prepared | None,
    ) -> Facts:
        found = probe(extents)
        memory, gpu, needed = None, None, 0
        if prepared is not None:
            memory, gpu = prepared.plan.memory, look_at_gpu(prepared.device)
            assert memory is not None
            needed = host_bytes(memory, is_on_gpu=gpu is not None)
        return Facts(
            this_process(self._place.rank),
            versions=software(),
            settings=settings_of(config),
            code=code_digest(self._conf_dir),
            source=source_digest(source.tensors),
            marks=found.marks,
            faults=tuple(found.faults),
            memory=memory,
            gpu=gpu,
            host_memory=look_at_host_memory(),
            host_needs=needed,
        )

    def _meet(self, facts: Facts, needs: Needs, cause: Exception | None = None) -> None:
        """Tells, hears, and raises what rank 0 makes of it."""
        meeting = self._open()
        if self._place.rank == 0 and not self._has_announced:
            self._announce(None)
        meeting.tell(facts)
        if self._place.rank != 0:
            verdict = meeting.answered()
        else:
            told: dict[int, Facts] = meeting.hear(self._join_s)
            verdict = judge(told, self._place.world, needs)
            hosts = {rank: of_rank.peer.host for rank, of_rank in told.items()}
            offsets = meeting.answer(verdict, told)
            self._remove_token()
            for warning in (*verdict.warnings, *clock_warnings(offsets, hosts)):
                logger.warning("%s", warning)
        if verdict.faults:
            count = len(verdict.faults)
            texts = (
                verdict.faults if count == 1 else (f"{count} reasons not to start", *verdict.faults)
            )
            raise JointError("\n  - ".join(texts)) from cause

    def _open(self) -> Meeting:
        if self._meeting is None:
            self._meeting = Meeting(self._place.rank, self._place.world, self._answer_s)
        return self._meeting

    def _announce(self, token: Path | None) -> None:
        self._open().announce(token)
        self._token, self._has_announced = token, True

    def _look_for_token(self, work: WorkDirectory) -> bool | None:
        """Whether the file that rank 0 makes beside the output is there; None if it makes none."""
        if self._place.rank == 0:
            self._announce(_make_token(work))
            return None if self._token is None else True
        token: Path | None = self._open().announced()
        return None if token is None else _sees(token)

    def _remove_token(self) -> None:
        if self._token is not None:
            self._token.unlink(missing_ok=True)


def needs_of(config: CalibrateConfig, prepared: Prepared) -> Needs:
    """What a run has still to write."""
    job, plan, work = prepared.job, prepared.plan, prepared.work
    small = sum(path.stat().st_size for path in prepared.source.small_files.values())
    tensors = TENSORS_OF_ONE * sum(group.tensors for group in plan.groups)
    left = plan.quantized_bytes
    if work.files.is_dir():
        left = unwritten_bytes(work.files, left)
    asked, size = config.snapshots, config.calibration
    count = 0 if asked.layers is None and asked.minutes is None else math.ceil(asked.keep) + 1
    snapshots = planned_bytes(
        job,
        tokens=(size.num_sequences, size.seq_len) if plan.needs_forward else (0, 0),
        compute_bytes=prepared.dtype.itemsize,
        wish=MemoryWish(
            evaluated=config.evaluation.num_sequences,
            group_sequences=config.evaluation.group_sequences,
            group_seq_len=config.evaluation.group_seq_len,
        ),
        snapshots=count,
    )
    units = len(job.schedules) + 3
    per_rank = units + 1 + count  # a record of each unit, a sign of life, parts of snapshots
    return Needs(
        bytes=left + small + BYTES_BESIDE_TENSOR * tensors,
        snapshots=max(0, snapshots - _bytes_below(work.snapshots)),
        files=plan.files + 2 * units + job.dims.world * per_rank + len(prepared.source.small_files),
    )


def host_bytes(memory: MemoryPlan, *, is_on_gpu: bool) -> int:
    """Host memory that a rank will take: pinned, or on a CPU that of everything but activations."""
    if is_on_gpu:
        return memory.host + SNAPSHOT_HOST_BYTES
    return memory.host + memory.slots + memory.hidden + memory.evaluation


def _make_token(work: WorkDirectory) -> Path | None:
    """A file with a name that nobody can have heard of, beside the output."""
    directory = next(path for path in (work.root.parent, *work.root.parents) if path.is_dir())
    token = directory / f".layersweep-{secrets.token_hex(8)}"
    try:
        token.touch()
    except OSError:  # no room: that is told otherwise
        return None
    return token


def _sees(token: Path) -> bool:
    end = time.monotonic() + TOKEN_S
    while not token.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
