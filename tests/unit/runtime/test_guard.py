"""What guards a run on one rank; of several ranks, see tests/e2e/test_failures.py."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import OutputError, StoppedError
from pipeline.runtime.collectives import Ranks
from pipeline.runtime.guard import Guard, Limits
from pipeline.runtime.life import Phase

ALONE = Ranks(None, None, None, torch.device("cpu"))


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_nothing_runs_on_afterwards(tmp_path: Path) -> None:
    with Guard() as guard:
        guard.connect(ALONE)
        guard.settle(tmp_path, tmp_path / "stop", 1, lambda how, why: None)
        assert {"guard", "watch", "signs"} <= threads()
    assert not {"guard", "watch", "signs"} & threads()
    assert guard.ending is None


def test_an_error_is_told_once_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: list[tuple[str, str]] = []
    with Guard() as guard:
        guard.connect(ALONE)
        guard.settle(tmp_path, tmp_path / "stop", 4, lambda how, why: ends.append((how, why)))
        guard.life.enter(Phase.commit, 2)
        with pytest.raises(OutputError), guard.telling(), guard.telling():
            raise OutputError("disk", value="full")
    assert guard.say() == 2
    assert [how for how, _ in ends] == ["refused"]
    assert ends[0][1].endswith("layer 2, phase commit: disk: found full")
    assert '"attempt": 4' in (tmp_path / "failure.json").read_text()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("layersweep: failed: rank 0 on ")


def test_an_unexpected_fault_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with Guard() as guard:
        guard.connect(ALONE)
        with pytest.raises(ZeroDivisionError), guard.telling():
            raise ZeroDivisionError("by nothing")
    assert guard.say() == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].endswith(
        "unexpected fault: ZeroDivisionError: by nothing. The same command begins anew"
    )


def test_a_stop_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Guard(rehearses=True) as guard:
        guard.connect(ALONE)
        guard.settle(tmp_path, tmp_path / "stop", 1, lambda how, why: None)
        with pytest.raises(StoppedError), guard.telling():
            raise StoppedError(3, "SIGUSR1")
    assert guard.say() == 75
    assert not (tmp_path / "failure.json").exists()
    said = "layersweep: stopped after layer 3 (SIGUSR1); a rehearsal begins anew\n"
    assert capsys.readouterr().err == said


def test_before_the_ranks_are_connected_nothing_is_told() -> None:
    with Guard() as guard, pytest.raises(OutputError), guard.telling():
        raise OutputError("x")
    assert guard.ending is None


def test_a_process_that_it_does_not_own_is_left_alone(tmp_path: Path) -> None:
    """As in a notebook: a rank that stands still is not ended."""
    with Guard(limits=Limits(stall_s=0.1)) as guard:
        guard.connect(ALONE)
        time.sleep(2.5)
        assert guard.ending is None


def wait_in_c(log: Path, limits: Limits) -> None:
    """A process whose main thread runs no Python, so that no handler of it is called."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    with Guard(limits=limits, owns_process=True) as guard, guard.listening():
        guard.connect(ALONE)
        log.with_suffix(".ready").touch()
        library = ctypes.CDLL(None)
        while True:
            library.pause()


@pytest.mark.parametrize(
    ("limits", "number", "status", "said"),
    [
        (Limits(stop_s=2.0), signal.SIGTERM, 75, "stopped in phase prepare (SIGTERM 2 s ago); "),
        (Limits(stall_s=1.0), 0, 3, "phase prepare: no progress for 1 s: the file system may hang"),
    ],
    ids=["sigterm", "stall"],
)
def test_a_main_thread_that_waits_in_c_is_ended(
    limits: Limits, number: int, status: int, said: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=wait_in_c, args=(log, limits))
    process.start()
    while not log.with_suffix(".ready").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(15)
    assert process.exitcode == status
    assert said in log.read_text().splitlines()[-1]
