"""Entry points: errors become exit statuses, messages without tracebacks, and one place."""

import os
import sys
from pathlib import Path

import pytest

from launch import entry
from launch.entry import place_of_process, run, take_positional
from pipeline.errors import AuditError, ConfigError, LayersweepError
from pipeline.preparation import Place

LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `run` would have slept; and an `os._exit` that can be caught."""
    slept: list[float] = []
    monkeypatch.setattr(entry.time, "sleep", slept.append)

    def leave(status: int) -> None:
        raise SystemExit(f"os._exit({status})")

    monkeypatch.setattr(os, "_exit", leave)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return slept


def status_of(outcome: BaseException | int, place: Place | None = None) -> int | str | None:
    def action() -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as caught:
        run(action, place or Place())
    return caught.value.code


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (0, 0),
        (1, 1),
        (2, 2),
        (ConfigError("x"), 2),
        (LayersweepError("x"), 2),
        (AuditError("x"), 1),
        (KeyboardInterrupt(), 130),
        (ValueError("x"), 3),
    ],
)
def test_exit_statuses(outcome: BaseException | int, status: int) -> None:
    assert status_of(outcome) == status


def test_a_refusal_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    status_of(ConfigError("output", value="/", rule="must be new", remedy="choose another"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "layersweep: error: output: found /; must be new. To mend it: choose another\n"
    )


def test_a_fault_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    status_of(ZeroDivisionError("by nothing"))
    text = capsys.readouterr().err
    assert text.startswith("layersweep: unexpected fault on rank 0\n")
    assert "Traceback" in text
    assert "ZeroDivisionError: by nothing" in text


def test_an_interrupted_run_says_that_it_can_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    status_of(KeyboardInterrupt())
    assert "the same command goes on from the last finished layer" in capsys.readouterr().err


def test_a_rank_that_fails_waits_for_nobody(
    capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    assert status_of(ConfigError("x"), Place(0, 4, 0)) == "os._exit(2)"
    assert waits == []
    assert "error (rank 0): x" in capsys.readouterr().err


def test_other_ranks_let_rank_0_speak_first(waits: list[float]) -> None:
    assert status_of(ConfigError("x"), Place(2, 4, 2)) == "os._exit(2)"
    assert waits == [entry.OTHERS_WAIT_S]


def test_victims_of_a_broken_connection_wait_longest(waits: list[float]) -> None:
    broken = RuntimeError("[gloo/transport] Connection closed by peer")
    assert status_of(broken, Place(1, 2, 1)) == "os._exit(3)"
    assert status_of(RuntimeError("shape mismatch"), Place(1, 2, 1)) == "os._exit(3)"
    assert waits == [entry.VICTIMS_WAIT_S]


def test_success_ends_normally_on_every_rank() -> None:
    assert status_of(0, Place(1, 2, 1)) == 0


def test_the_place_comes_from_torchrun_or_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of_process() == Place(0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert place_of_process() == Place(0, 1, 0), "a plain command inside an allocation"
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert place_of_process() == Place(5, 8, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place_of_process() == Place(3, 4, 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert place_of_process() == Place(3, 4, 3)


@pytest.mark.parametrize(
    ("given", "taken", "left"),
    [
        (["DIR"], "DIR", []),
        (["DIR", "source=X"], "DIR", ["source=X"]),
        (["output=json", "DIR"], "DIR", ["output=json"]),
        (["directory=DIR"], None, ["directory=DIR"]),
        (["--help"], None, ["--help"]),
        (["--config-name", "verify"], None, ["--config-name", "verify"]),
        ([], None, []),
    ],
)
def test_the_first_word_that_is_no_option_is_taken(
    given: list[str], taken: str | None, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify", *given])
    assert take_positional() == taken
    assert sys.argv[1:] == left


def test_a_directory_with_an_equals_sign_is_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "lr=1,[a]"
    directory.mkdir()
    monkeypatch.setattr(sys, "argv", ["verify", str(directory)])
    assert take_positional() == str(directory)
