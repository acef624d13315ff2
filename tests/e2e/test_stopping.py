"""A run that is asked to stop: it ends after the layer in hand, and the same command goes on."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.live_ranks import Blow, Ranks, assert_same_output, slow_layers

EP2 = "parallel.ep=2"
STOPPED = 75


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert Ranks(output, EP2).wait() == [0, 0]
    return output


def both(arm: Callable[[], None]) -> dict[int, Callable[[], None]]:
    return {0: arm, 1: arm}


def slowly(output: Path, *options: str, torchrun: bool = False) -> Ranks:
    """A run that takes some seconds."""
    return Ranks(output, EP2, *options, arm=both(lambda: slow_layers(0.4)), torchrun=torchrun)


def make_stop_file(ranks: Ranks) -> None:
    (ranks.work / "stop").touch()


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda ranks: ranks.kill(1, signal.SIGTERM), "SIGTERM"),
        (lambda ranks: ranks.kill(0, signal.SIGUSR1), "SIGUSR1"),
        (make_stop_file, "the file stop"),
    ],
    ids=["sigterm", "sigusr1", "file"],
)
def test_one_rank_is_asked_and_all_stop_after_the_layer(
    ask: Callable[[Ranks], None], reason: str, tmp_path: Path, undisturbed: Path
) -> None:
    output = tmp_path / "out"
    ranks = slowly(output)
    ranks.until_layer(0)
    ask(ranks)
    assert ranks.wait() == [STOPPED, STOPPED], ranks.text(0)
    assert ranks.is_gone()
    found = re.fullmatch(
        rf"layersweep: stopped after layer (\d) \({reason}\); the same command goes on",
        ranks.last_line(0),
    )
    assert found, ranks.text(0)
    layer = int(found.group(1))
    assert layer < 6
    assert "layersweep: " not in ranks.text(1)
    markers = {path.name for path in ranks.work.glob("journal/layer-*.commit.json")}
    assert markers == {f"layer-{done:05d}.commit.json" for done in range(layer + 1)}
    ended = ranks.attempts()[-1]
    assert (ended["how"], ended["why"]) == ("stopped", f"after layer {layer} ({reason})")
    assert not (ranks.work / "state" / "failure.json").exists()
    if reason != "SIGTERM":
        return  # one of them shows what follows
    again = Ranks(output, EP2)
    assert again.wait() == [0, 0], again.text(0)
    said = f"(attempt 2; the last one: stopped after layer {layer} ({reason}))"
    assert said in again.text(0)
    assert_same_output(output, undisturbed)
    attempts = json.loads((output / "layersweep" / "run.json").read_text())["attempts"]
    assert [line["event"] for line in attempts] == ["began", "ended"] * 2
    assert attempts[-1]["how"] == "finished"
    assert [line["hosts"] for line in attempts[::2]] == [[os.uname().nodename]] * 2


def test_a_layer_that_takes_too_long_is_abandoned(tmp_path: Path) -> None:
    """Whatever its main thread waits for: rank 1 never comes to the collective of layer 3."""
    note = tmp_path / "hangs"
    blow = Blow("in forward", 3, rank=1, by="hang", note=note)
    ranks = Ranks(tmp_path / "out", EP2, "stop_seconds=3", arm={1: blow.arm})
    ranks.until(note.exists)
    ranks.kill(0, signal.SIGTERM)
    asked = time.monotonic()
    assert ranks.wait() == [STOPPED, STOPPED], ranks.text(0)
    assert 2.0 < ranks.ended - asked < 3.0 + 3.0
    assert ranks.last_line(0) == (
        "layersweep: stopped in layer 3 (SIGTERM 3 s ago); the same command goes on"
    )
    assert ranks.attempts()[-1]["how"] == "stopped"
    assert ranks.is_gone()


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    def arm() -> None:
        from pipeline.runtime import guard

        guard.SAME_SIGNAL_S = 0.5

    note = tmp_path / "hangs"

    def hang() -> None:
        arm()
        Blow("in forward", 3, rank=1, by="hang", note=note).arm()

    ranks = Ranks(tmp_path / "out", EP2, arm={0: arm, 1: hang})
    ranks.until(note.exists)
    ranks.kill(1, signal.SIGTERM)
    time.sleep(0.1)
    ranks.kill(1, signal.SIGTERM)  # as Slurm's and torchrun's come together
    time.sleep(1.0)
    assert not ranks.processes[1].exitcode
    ranks.kill(1, signal.SIGTERM)
    asked = time.monotonic()
    assert ranks.wait() == [STOPPED, STOPPED], ranks.text(0)
    assert ranks.ended - asked < 4.0
    assert ranks.last_line(0) == (
        "layersweep: stopped in layer 3 (a second SIGTERM); the same command goes on"
    )


@pytest.mark.slow
def test_a_publication_goes_on_if_there_is_time(tmp_path: Path, undisturbed: Path) -> None:
    note = tmp_path / "audits"

    def slow_audit() -> None:
        from pipeline import publication

        audit = publication.audit

        def slow(*args: object, **kwargs: object) -> object:
            note.touch()
            time.sleep(3)
            return audit(*args, **kwargs)  # type: ignore[arg-type]

        publication.audit = slow  # type: ignore[assignment]

    output = tmp_path / "out"
    ranks = Ranks(output, EP2, arm={0: slow_audit})
    ranks.until(note.exists)
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.text(0)
    assert_same_output(output, undisturbed)

    note.unlink()
    output = tmp_path / "short"
    ranks = Ranks(output, EP2, "stop_seconds=2", arm={0: slow_audit})
    ranks.until(note.exists)
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [STOPPED, 0], ranks.text(0)
    assert ranks.last_line(0).startswith("layersweep: stopped in phase audit (SIGTERM 2 s ago)")


def test_sigterm_before_the_ranks_are_connected(tmp_path: Path) -> None:
    note = tmp_path / "reads"

    def slow_start() -> None:
        from pipeline import calibrate

        def wait(*_: object) -> None:
            note.touch()
            time.sleep(3600)

        calibrate.load_tokens = wait  # type: ignore[assignment]

    ranks = Ranks(tmp_path / "out", EP2, arm={0: slow_start})
    ranks.until(note.exists)
    for rank in (0, 1):
        ranks.kill(rank, signal.SIGTERM)
    assert ranks.wait(20) == [STOPPED, 2]  # the highest counts
    assert ranks.last_line(0) == "layersweep: stopped before the first layer (SIGTERM)"
    assert ranks.last_line(1) == ""
    assert not ranks.work.exists()


@pytest.mark.slow
def test_torchrun_hands_sigterm_on(tmp_path: Path) -> None:
    ranks = slowly(tmp_path / "out", torchrun=True)
    ranks.until_layer(0)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.wait() == [2]
    assert re.fullmatch(
        r"layersweep: stopped after layer \d \(SIGTERM\); the same command goes on",
        ranks.last_line(0),
    ), ranks.text(0)
    assert ranks.is_gone()


@pytest.mark.slow
def test_ranks_whose_torchrun_has_died_stop(tmp_path: Path) -> None:
    ranks = slowly(tmp_path / "out", torchrun=True)
    ranks.until_layer(0)
    pid = ranks.processes[0].pid
    os.kill(pid, signal.SIGKILL)
    ranks.wait()
    ranks.until(ranks.is_gone)
    assert re.fullmatch(
        r"layersweep: stopped after layer \d \(its launcher ended\); the same command goes on",
        ranks.last_line(0),
    ), ranks.text(0)
    assert ranks.attempts()[-1]["how"] == "stopped"
