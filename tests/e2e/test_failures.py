"""When one rank fails, dies or hangs: all ranks end in seconds, with one message that says why."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.runtime import signs
from tests.e2e.live_ranks import Blow, Ranks, assert_same_output, failed_line

DIED = "died without a word (killed, e.g. by the kernel for memory; see dmesg)"
GOES_ON = "The same command goes on from layer 3"
SOON_S = 5.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert Ranks(output, "parallel.ep=2").wait() == [0, 0]
    return output


class Struck:
    """A run of two ranks in which something happens to one of them; it has ended."""

    def __init__(self, tmp_path: Path, blow: Blow, *options: str, torchrun: bool = False) -> None:
        self.output = tmp_path / "out"
        note = tmp_path / "struck"
        blow = replace(blow, note=note)
        self.ranks = Ranks(
            self.output, "parallel.ep=2", *options, arm={blow.rank: blow.arm}, torchrun=torchrun
        )
        self.statuses = self.ranks.wait()
        self.after_s = self.ranks.ended - float(note.read_text())

    def assert_goes_on(self, expected: Path, arm: Callable[[], None]) -> None:
        again = Ranks(self.output, "parallel.ep=2", arm=dict.fromkeys((0, 1), arm))
        assert again.wait() == [0, 0], again.text(0)
        assert_same_output(self.output, expected)


def test_a_rank_that_raises_ends_all(tmp_path: Path, undisturbed: Path) -> None:
    struck = Struck(tmp_path, Blow("in forward", 3, rank=1, by="raise"))
    ranks = struck.ranks
    assert struck.statuses == [3, 3]
    assert struck.after_s < SOON_S
    assert ranks.is_gone()
    cause = "unexpected fault: InjectedError: in forward 3"
    line = failed_line(1, 3, "forward", cause, GOES_ON)
    for rank in (0, 1):
        assert re.fullmatch(line, ranks.last_line(rank)), ranks.text(rank)
    assert ranks.text(1).count("Traceback") == 1
    assert "Traceback" not in ranks.text(0)
    failure = ranks.failure()
    assert (failure["rank"], failure["layer"], failure["phase"]) == (1, 3, "forward")
    assert (failure["cause"], failure["attempt"]) == (cause, 1)
    began, ended = ranks.attempts()
    assert (began["event"], began["world"], began["attempt"]) == ("began", 2, 1)
    assert (ended["event"], ended["how"]) == ("ended", "failed")
    assert cause in ended["why"]
    struck.assert_goes_on(undisturbed, break_signs)


def break_signs() -> None:
    """Disk trouble of the signs of life must end no run."""

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    signs.os = SimpleNamespace(replace=fail)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("blow", "phase"),
    [
        (Blow("in forward", 3, rank=0), "forward"),
        (Blow("after part", 3, rank=1), "commit"),
    ],
    ids=["rank-0-forward", "rank-1-commit"],
)
def test_a_rank_that_is_killed_is_named(blow: Blow, phase: str, tmp_path: Path) -> None:
    struck = Struck(tmp_path, blow)
    other = 1 - blow.rank
    assert struck.statuses[blow.rank] == -signal.SIGKILL
    assert struck.statuses[other] == 3
    assert struck.after_s < SOON_S
    text = struck.ranks.text(other)
    assert re.fullmatch(
        failed_line(blow.rank, 3, phase, DIED, GOES_ON), struck.ranks.last_line(other)
    ), text
    assert "Traceback" not in text
    assert struck.ranks.failure()["rank"] == blow.rank
    ends = [line for line in struck.ranks.attempts() if line["event"] == "ended"]
    assert [end["how"] for end in ends] == ([] if blow.rank == 0 else ["failed"])


def test_an_attempt_that_could_not_say_how_it_ended(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert Ranks(output, world=1, arm={0: Blow("in forward", 3).arm}).wait() == [-signal.SIGKILL]
    again = Ranks(output, world=1, arm={0: Blow("in forward", 4, by="raise").arm})
    assert again.wait() == [3]
    lines = again.attempts()
    assert [line["event"] for line in lines] == ["began", "ended", "began", "ended"]
    assert [line["attempt"] for line in lines] == [1, 1, 2, 2]
    assert lines[1]["how"] == "died"
    assert re.search(r"rank 0 on \S+ in layer 3, forward, \d{4}-", lines[1]["why"])
    assert f"attempt 2; the last one: died: {lines[1]['why']})" in again.text(0)


def test_a_refusal_in_the_sweep_says_what_to_mend_first(tmp_path: Path) -> None:
    struck = Struck(tmp_path, Blow("in forward", 3, rank=1, by="refusal"))
    assert struck.statuses == [2, 2]
    cause = "disk: found full; must have room. To mend it: make room"
    line = failed_line(1, 3, "forward", cause, "The same command then goes on from layer 3")
    for rank in (0, 1):
        text = struck.ranks.text(rank)
        assert re.fullmatch(line, struck.ranks.last_line(rank)), text
        assert "Traceback" not in text
    assert struck.ranks.attempts()[-1]["how"] == "refused"


def test_a_rank_that_runs_out_of_memory_says_so(tmp_path: Path) -> None:
    struck = Struck(tmp_path, Blow("in forward", 3, rank=1, by="memory"))
    assert struck.statuses == [3, 3]
    assert struck.after_s < SOON_S
    last = struck.ranks.last_line(0)
    assert f"rank 1 on {os.uname().nodename}, layer 3, phase forward: CUDA out of memory." in last
    assert "calibration.micro_batch" in last
    assert last.endswith(GOES_ON)
    assert "Traceback" not in struck.ranks.text(1)


def test_a_rank_that_hangs_is_named_and_not_its_victims(tmp_path: Path) -> None:
    struck = Struck(tmp_path, Blow("in read", 3, rank=1, by="hang"), "stall_minutes=0.05")
    assert struck.statuses == [3, 3]
    assert 3.0 < struck.after_s < 3.0 + SOON_S
    cause = "no progress for 3 s: the file system may hang"
    line = failed_line(1, 3, "read", cause, GOES_ON)
    for rank in (0, 1):
        assert re.fullmatch(line, struck.ranks.last_line(rank)), struck.ranks.text(rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_is_given_up(rank: int, tmp_path: Path) -> None:
    """As one whose host is lost: no connection breaks."""
    blow = Blow("in forward", 3, rank=rank, by="freeze", note=tmp_path / "struck")
    ranks = Ranks(tmp_path / "out", "parallel.ep=2", "failure_seconds=2", arm={rank: blow.arm})
    other = ranks.processes[1 - rank]
    other.join(40)
    ended = time.monotonic()
    ranks.kill(rank, signal.SIGKILL)
    ranks.wait()
    assert other.exitcode == 3
    assert 1.5 < ended - float((tmp_path / "struck").read_text()) < 2.0 + SOON_S
    last = ranks.last_line(1 - rank)
    assert last.startswith(f"layersweep: failed: rank {rank} on "), ranks.text(1 - rank)
    assert ("cannot be reached for 2 s" if rank == 0 else "no sign of life for ") in last


@pytest.mark.parametrize(
    ("blow", "cause"),
    [
        (Blow("in forward", 3, rank=0, by="raise"), "InjectedError: in forward 3"),
        (Blow("in forward", 3, rank=1), DIED),
    ],
    ids=["raises", "killed"],
)
def test_torchrun_shows_the_cause(
    blow: Blow, cause: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    struck = Struck(tmp_path, blow, torchrun=True)
    assert struck.statuses == [1]
    assert struck.after_s < SOON_S
    ranks = struck.ranks
    last = ranks.last_line(0)
    assert last.startswith(f"layersweep: failed: rank {blow.rank} on "), ranks.text(0)
    assert cause in last
    assert ranks.is_gone()
    if blow.by == "raise":
        assert f"traceback : {last}" in ranks.agent_text()
    assert ranks.attempts()[-1]["how"] == "failed"
