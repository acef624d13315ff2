"""The list of attempts, whatever became of the last one."""

import json
from pathlib import Path

import pytest

from pipeline.checkpoint.attempts import Attempts, read_attempts
from pipeline.checkpoint.publish import WorkDirectory

FACTS = {"world": 2, "hosts": ["a", "b"], "layout": "world=2", "slurm_job_id": "7", "restart": 0}


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    work = WorkDirectory.beside(tmp_path / "out")
    work.state.mkdir(parents=True)
    return work


def sign(work: WorkDirectory, rank: int, updated: float, **changes: object) -> None:
    values = {"rank": rank, "host": "a", "phase": "forward", "layer": 12, "updated": updated}
    path = work.state / f"rank-{rank:05d}.json"
    path.write_text(json.dumps({**values, **changes}))


def test_each_attempt_begins_and_ends(work: WorkDirectory) -> None:
    first = Attempts(work)
    assert first.begin(FACTS) == ""
    first.end("stopped", "after layer 41 (SIGUSR1)")
    work.stop.touch()
    sign(work, 0, 1.5)
    second = Attempts(work)
    assert second.begin(FACTS) == "stopped after layer 41 (SIGUSR1)"
    assert second.number == 2
    assert not work.stop.exists()
    assert list(work.state.iterdir()) == []
    second.end("failed", "rank 1 on b: a cause")
    assert Attempts(work).begin({}) == "failed: rank 1 on b: a cause"
    lines = second.read()
    assert [(line["attempt"], line["event"]) for line in lines] == [
        *((1, "began"), (1, "ended"), (2, "began"), (2, "ended"), (3, "began"))
    ]
    assert FACTS.items() <= lines[0].items()
    assert all(line["time"] > 1e9 for line in lines)


def test_an_attempt_without_an_end_died(work: WorkDirectory) -> None:
    Attempts(work).begin(FACTS)
    sign(work, 0, 2.0, layer=None, phase="publish")
    sign(work, 1, 1.0)
    said = Attempts(work).begin(FACTS)
    assert said.startswith("died: last signs of life: rank 1 on a in layer 12, forward, 1970-01-01")
    assert "; rank 0 on a in publish, " in said
    ended = read_attempts(work.attempts)[1]
    assert (ended["attempt"], ended["how"], ended["time"]) == (1, "died", 2.0)


def test_the_failure_that_its_peers_found_says_why_it_died(work: WorkDirectory) -> None:
    Attempts(work).begin(FACTS)
    sign(work, 1, 1.0)
    record = {"rank": 0, "host": "a", "cause": "died without a word"}
    (work.state / "failure.json").write_text(json.dumps(record))
    assert Attempts(work).begin(FACTS) == "died: rank 0 on a: died without a word"


def test_an_attempt_that_left_nothing_died_too(work: WorkDirectory) -> None:
    Attempts(work).begin(FACTS)
    assert Attempts(work).begin(FACTS) == "died: it left no sign of life"


def test_torn_and_foreign_lines_are_left_alone(work: WorkDirectory) -> None:
    first = Attempts(work)
    first.begin(FACTS)
    with work.attempts.open("a") as file:
        file.write('[1]\n{"attempt": "2"}\n{"attempt": 9, "event": "ended"}\n{"attempt": 1, "ev')
    first.end("failed", "x")
    assert Attempts(work).begin(FACTS) == "failed: x"
    assert [line["attempt"] for line in read_attempts(work.attempts)] == [1, 1, 2]


def test_no_file_is_no_attempt(tmp_path: Path) -> None:
    assert read_attempts(tmp_path / "attempts.jsonl") == []
