"""What a run says at its end: one line, and a status."""

import errno
import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import AuditError, ConfigError, StoppedError
from pipeline.runtime.endings import Ending, Status, describe, ending_of, is_lost_connection
from pipeline.runtime.launcher import has_another_told, tell_torchrun
from pipeline.runtime.life import Life, Phase


def life_at(layer: int | None, todo: list[int] | None) -> Life:
    life = Life()
    life.enter(Phase.forward, layer)
    life.todo = todo
    return life


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ValueError("two\n  lines."),
            "failed: rank 1 on h, layer 3, phase forward: unexpected fault: ValueError: "
            "two lines. The same command goes on from layer 3",
        ),
        (
            ConfigError("x", value=1, rule="must be 2", remedy="change it"),
            "failed: rank 1 on h, layer 3, phase forward: x: found 1; must be 2. "
            "To mend it: change it. The same command then goes on from layer 3",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full"),
            "failed: rank 1 on h, layer 3, phase forward: /full: No space left on device; make "
            "room. The same command then goes on from layer 3",
        ),
        (StoppedError(3, "SIGUSR1"), "stopped after layer 3 (SIGUSR1); the same command goes on"),
        (KeyboardInterrupt(), "interrupted; the same command goes on"),
    ],
)
def test_the_last_line(error: BaseException, line: str) -> None:
    ending = ending_of(error, 1, "h", life_at(3, [3, 4]), rehearses=False)
    assert ending.line == f"layersweep: {line}"
    assert Ending.decode(ending.encode()) == ending


@pytest.mark.parametrize(
    ("todo", "rehearses", "resume"),
    [
        (None, False, "The same command begins anew"),
        ([], False, "The same command goes on with what follows the layers"),
        ([3], True, "The same command begins anew"),
    ],
)
def test_what_the_same_command_does(todo: list[int] | None, rehearses: bool, resume: str) -> None:
    ending = ending_of(ValueError("x"), 0, "h", life_at(None, todo), rehearses)
    assert ending.line.endswith(f"phase forward: unexpected fault: ValueError: x. {resume}")


@pytest.mark.parametrize(
    ("error", "how", "status"),
    [
        (StoppedError(None, "SIGTERM"), "stopped", Status.stopped),
        (KeyboardInterrupt(), "stopped", Status.interrupted),
        (AuditError("x"), "refused", Status.audit_failed),
        (ConfigError("x"), "refused", Status.refused),
        (OSError(errno.EIO, "Input/output error"), "failed", Status.fault),
        (MemoryError(), "failed", Status.fault),
        (ValueError("x"), "failed", Status.fault),
    ],
)
def test_statuses(error: BaseException, how: str, status: Status) -> None:
    found = describe(error)
    assert (found[0], found[2]) == (how, status)
    assert found[1]


def test_memory_that_ran_out_says_what_needs_less() -> None:
    _, cause, status = describe(torch.OutOfMemoryError("CUDA out of memory. Tried " + "x" * 999))
    assert cause.startswith("CUDA out of memory. Tried")
    assert "hidden_store=host" in cause
    assert len(cause) < 600
    assert status == Status.fault


def test_victims_are_known_by_their_error() -> None:
    assert is_lost_connection(RuntimeError("[gloo/pair.cc] Connection closed by peer"))
    assert is_lost_connection(ConnectionResetError("Connection reset by peer"))
    assert not is_lost_connection(RuntimeError("shape mismatch"))
    assert not is_lost_connection(ConfigError("gloo"))


def test_torchrun_reads_the_cause_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    paths = [tmp_path / str(rank) / "error.json" for rank in range(2)]
    for path in paths:
        path.parent.mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(paths[1]))
    assert not has_another_told()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(paths[0]))
    tell_torchrun("the cause", 12.7)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file=str(paths[0]))
    assert failure.timestamp == 12
    message = json.loads(paths[0].read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == "the cause"
    assert not has_another_told()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(paths[1]))
    assert has_another_told()
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    tell_torchrun("to nobody", 0.0)
    assert not has_another_told()
