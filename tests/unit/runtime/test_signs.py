"""Signs of life on disk."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.runtime.life import Life, Phase
from pipeline.runtime.peers import this_process
from pipeline.runtime.signs import (
    Signs,
    clear_signs,
    read_record,
    read_signs,
    sign_path,
    write_failure,
)

ME = this_process(3)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_file_follows_the_rank(tmp_path: Path) -> None:
    life, stopped = Life(), threading.Event()
    life.layers, stop_file = 7, tmp_path / "stop"
    signs = Signs(tmp_path, ME, 4, 2, life, stop_file=stop_file, found_stop=stopped.set)
    path = sign_path(tmp_path, 3)
    assert path.name == "rank-00003.json"
    until(path.exists)
    life.enter(Phase.forward, 5)
    life.layer_done(4, {"tokens_per_s": 2.5})
    until(lambda: json.loads(path.read_text())["phase"] == "forward")
    assert not stopped.is_set()
    stop_file.touch()
    until(stopped.is_set)
    life.enter(Phase.wait, 5)
    signs.close()
    sign = json.loads(path.read_text())
    updated = sign.pop("updated")
    assert abs(time.time() - updated) < 10
    assert sign == {
        "rank": 3,
        "world": 4,
        "host": ME.host,
        "pid": ME.pid,
        "attempt": 2,
        "phase": "wait",
        "layer": 5,
        "layers": 7,
        "done": 1,
        "since": life.since,
        "tokens_per_s": 2.5,
    }
    assert read_signs(tmp_path) == [{**sign, "updated": updated}]


def test_a_directory_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    signs = Signs(directory, ME, 4, 1, Life(), stop_file=None, found_stop=lambda: None)
    signs.close()
    assert not directory.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "signs"]


def test_the_first_failure_stays_until_it_is_cleared(tmp_path: Path) -> None:
    clear_signs(tmp_path / "state")
    for cause in ("first", "second"):
        write_failure(tmp_path / "state", {"cause": cause})
    path = tmp_path / "state" / "failure.json"
    assert read_record(path) == {"cause": "first"}
    clear_signs(tmp_path / "state")
    assert read_record(path) is None
    write_failure(tmp_path / "nowhere", {"cause": "no directory"})


def test_what_is_no_sign_is_not_read(tmp_path: Path) -> None:
    for rank, text in enumerate(("{", "[]", '{"updated": "now"}', '{"updated": 1e30}')):
        sign_path(tmp_path, rank).write_text(text)
    sign_path(tmp_path, 9).write_text('{"updated": 1.5}')
    assert read_signs(tmp_path) == [{"updated": 1.5}]
