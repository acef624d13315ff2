"""Two runs never work in one directory."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from pipeline.checkpoint import lock
from pipeline.checkpoint.lock import WorkLock
from pipeline.checkpoint.publish import WorkDirectory, check_output
from pipeline.errors import OutputError
from pipeline.runtime.signs import sign_path


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    work = WorkDirectory.beside(tmp_path / "out")
    said = r"out\.partial: found in use by another run"
    with WorkLock(work), pytest.raises(OutputError, match=said):
        WorkLock(work)
    with WorkLock(work):
        pass


def test_what_a_refused_start_leaves_behind_can_go_on(tmp_path: Path) -> None:
    with WorkLock(WorkDirectory.beside(tmp_path / "out")):
        pass
    assert check_output(tmp_path / "out").root == tmp_path / "out.partial"


def sign(work: WorkDirectory, updated: float, **changes: object) -> None:
    work.state.mkdir(parents=True, exist_ok=True)
    values = {"host": "another", "pid": 1, "updated": updated, **changes}
    path = sign_path(work.state, 0)
    path.with_suffix(".tmp").write_text(json.dumps(values))
    path.with_suffix(".tmp").replace(path)


def test_a_run_on_another_host_is_known_by_its_signs(tmp_path: Path) -> None:
    work = WorkDirectory.beside(tmp_path / "out")
    sign(work, 1.0)
    timer = threading.Timer(0.2, lambda: sign(work, 2.0))
    timer.start()
    with pytest.raises(OutputError, match="in use by another run, on another; one run at a time"):
        WorkLock(work)
    timer.join()


@pytest.mark.parametrize("case", ["old", "dead", "ours", "torn", "silent"])
def test_signs_of_a_dead_run_are_no_hindrance(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WATCHED_S", 0.5 if case == "silent" else 60.0)
    work, here = WorkDirectory.beside(tmp_path / "out"), socket.gethostname()
    if case == "dead":
        sign(work, 1.0, host=here, pid=2**22 + 1)  # above the highest id of Linux
    elif case == "ours":
        sign(work, 1.0, host=here, pid=os.getpid())
    else:
        sign(work, 1.0)
    path = sign_path(work.state, 0)
    if case == "torn":
        path.write_text('{"host": "an')
    if case == "old":
        os.utime(path, (1.0, 1.0))
    with WorkLock(work):
        pass
