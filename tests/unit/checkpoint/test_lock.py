"""Two runs never work in one directory."""

from pathlib import Path

import pytest

from pipeline.checkpoint.lock import WorkLock
from pipeline.checkpoint.publish import WorkDirectory, check_output
from pipeline.errors import OutputError


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
