"""The command on real gloo ranks, each a fork with its own log: signals, deaths, last words.

ranks = Ranks(tmp_path / "out", arm={1: Blow("in forward", 3, by="raise").arm})
statuses = ranks.wait()
assert ranks.last_line(0) == ...
"""

import ctypes
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import launch.calibrate
from launch.entry import CONF_DIR
from pipeline import publication
from pipeline.errors import OutputError
from pipeline.filling import SlotFiller
from pipeline.mcore import slots  # noqa: F401  (imported before forking: once, not per rank)
from pipeline.recipe import load_recipe
from pipeline.runtime import signs
from pipeline.runtime.watch import Watch
from pipeline.visit import Visit
from tests.distributed.helpers import free_port
from tests.e2e.harness import GOLDEN, GOLDEN_SIZE
from tests.e2e.restarts import Fault, _hook, losses, published

HOST = re.escape(socket.gethostname())
FORK = multiprocessing.get_context("fork")
OPTIONS = (
    f"checkpoint={GOLDEN / 'source'}",
    f"data={GOLDEN / 'calibration_ids.npy'}",
    *(f"calibration.{name}={value}" for name, value in GOLDEN_SIZE.items()),
    "evaluation.num_sequences=0",
    "allow_bad_loss=true",
    "device=cpu",
    "timeout_minutes=1",
    "snapshots.minutes=null",
)
Arm = Callable[[], None]
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Blow(Fault):
    """Also a rank that hangs or runs out of memory; its peers, and its note, know where it is."""

    note: Path | None = None

    def arm(self) -> None:
        if self.phase == "in read":
            _hook(SlotFiller, "_fill", self, self._is_filled)
        else:
            super().arm()

    def strike(self) -> None:
        if self.by == "kill":
            _until_peers_know()
        if self.note is not None:
            self.note.write_text(repr(time.monotonic()))
        if self.by == "hang":
            time.sleep(3600)
        if self.by == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.by == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")
        if self.by == "refusal":
            raise OutputError("disk", value="full", rule="must have\nroom", remedy="make room")
        super().strike()

    def _is_filled(self, _filler: object, schedule: Any, *_: object) -> bool:
        return bool(schedule.layer == self.unit)


def _until_peers_know() -> None:
    """Until every rank has fetched a beat that this one has set, and its sign is on disk."""
    look, watches = Watch._look, list[Watch]()

    def looked(watch: Watch, elapsed_s: float) -> None:
        look(watch, elapsed_s)
        watches.append(watch)

    def counts() -> list[int]:
        beats = watches[-1]._beats
        return [beat.count for rank, beat in enumerate(beats) if rank != watches[-1].me.rank]

    Watch._look = looked  # type: ignore[method-assign]
    deadline = time.monotonic() + 20
    while len(watches) < 2 and time.monotonic() < deadline:  # the second has begun after this
        time.sleep(0.01)
    enough = [count + 2 for count in counts()]
    while any(a < b for a, b in zip(counts(), enough, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(2 * signs.LOOK_S)


def slow_layers(seconds: float, *, first: int = 0) -> None:
    """Every layer takes so much longer."""
    original = Visit.run

    def slowed(visit: Visit, *, redo: bool) -> None:
        if visit.schedule.layer >= first:
            time.sleep(seconds)
        original(visit, redo=redo)

    Visit.run = slowed  # type: ignore[method-assign]


class Ranks:
    """One attempt of the command on several ranks, which has begun.

    Args:
        output: The directory to make.
        options: As on the command line.
        world: Number of ranks.
        arm: By rank, what is called before the command.
        torchrun: Whether torch's own agent starts the ranks.
    """

    def __init__(
        self,
        output: Path,
        *options: str,
        world: int = 2,
        arm: Mapping[int, Arm] | None = None,
        torchrun: bool = False,
    ) -> None:
        load_recipe("nvfp4_four_over_six", CONF_DIR / "recipe")  # imports Model Optimizer once
        self.work = output.with_name(output.name + ".partial")
        self.folder = output.with_name(f"{output.name}.logs-{time.monotonic_ns()}")
        self.folder.mkdir()
        self._arguments = [*OPTIONS, f"output={output}", *options]
        self._arm, self.world = arm or {}, world
        self.pids: list[int] = []
        self.processes: list[Any] = []
        if torchrun:
            self.processes = [FORK.Process(target=self._agent)]
        else:
            port = free_port()
            self.processes = [
                FORK.Process(target=self._rank, args=(rank, port), daemon=True)
                for rank in range(world)
            ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 40.0) -> list[int]:
        """Exit statuses, once all have ended; those that have not by then are killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.ended = time.monotonic()
        late = [index for index, process in enumerate(self.processes) if process.is_alive()]
        for index in late:
            os.kill(self.processes[index].pid, signal.SIGKILL)
            self.processes[index].join()
        assert not late, f"{late} still ran: {[self.text(rank) for rank in range(self.world)]}"
        return [process.exitcode for process in self.processes]

    def kill(self, rank: int, number: int) -> None:
        os.kill(self.pid(rank), number)

    def pid(self, rank: int) -> int:
        return int((self.folder / f"{rank}.pid").read_text())

    def until(self, condition: Callable[[], bool], timeout: float = 20.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, [self.text(rank) for rank in range(self.world)]
            time.sleep(0.02)

    def until_layer(self, layer: int) -> None:
        """Until a layer is committed."""
        marker = self.work / "journal" / f"layer-{layer:05d}.commit.json"
        self.until(marker.exists)

    def text(self, rank: int) -> str:
        path = self.folder / f"{rank}.err"
        return path.read_text() if path.exists() else ""

    def last_line(self, rank: int) -> str:
        return self.text(rank).rstrip("\n").rpartition("\n")[2]

    def agent_text(self) -> str:
        return (self.folder / "agent.txt").read_text()

    def attempts(self) -> list[dict[str, Any]]:
        text = (self.work / "attempts.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def failure(self) -> dict[str, Any]:
        found = json.loads((self.work / "state" / "failure.json").read_text())
        assert isinstance(found, dict)
        return found

    def is_gone(self) -> bool:
        """Whether no process of any rank is left."""
        return not any(Path(f"/proc/{self.pid(rank)}").exists() for rank in range(self.world))

    def _rank(self, rank: int, port: int) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(self.world),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        self._become(rank)

    def _become(self, rank: int) -> None:
        """The rest of the life of a rank."""
        (self.folder / f"{rank}.pid").write_text(str(os.getpid()))
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        for name, target in (("out", 1), ("err", 2)):
            descriptor = os.open(self.folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, target)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["launch/calibrate.py", *self._arguments]
        publication.write_html = lambda report, path: path.write_text("")
        self._arm.get(rank, lambda: None)()
        status: Any = 99
        try:
            launch.calibrate.main()
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _agent(self) -> None:
        """torchrun's agent, with workers that are forks."""
        status = 0
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.world,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            start_method="fork",
            logs_specs=DefaultLogsSpecs(str(self.folder / "elastic"), redirects=Std.NONE),
        )
        try:
            elastic_launch(config, self._worker)()
        except ChildFailedError as error:
            (self.folder / "agent.txt").write_text(str(error))
            status = 1
        except BaseException as error:
            (self.folder / "agent.txt").write_text(repr(error))
            status = 2
        os._exit(status)

    def _worker(self) -> None:
        # torchrun's processes, unlike its forks, ask for no signal when it dies.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
        self._become(int(os.environ["RANK"]))


def assert_same_output(output: Path, expected: Path) -> None:
    """Byte-identical (the saved options hold the directory), nothing left over."""
    ours, theirs = published(output), published(expected)
    assert set(ours) == set(theirs)
    changed = [name for name in ours if ours[name] != theirs[name]]
    assert set(changed) <= {"layersweep/config.yaml"}
    assert losses(output) == losses(expected)
    assert not output.with_name(output.name + ".partial").exists()


def failed_line(rank: int, layer: int | None, phase: str, cause: str, resume: str) -> str:
    """A pattern of the last line."""
    where = "" if layer is None else f", layer {layer}"
    start = f"layersweep: failed: rank {rank} on {HOST}{where}, phase {phase}: "
    return start + re.escape(cause) + r"\. " + re.escape(resume)
