"""Logging: the rank in the prefix, rank 0 speaks, the others only for errors."""

import logging
from collections.abc import Iterator

import pytest

from pipeline.runtime.logs import set_up_logging

NAMES = ("pipeline", "launch", "torch.utils.cpp_extension")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in NAMES}
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, value in levels.items():
        logging.getLogger(name).setLevel(value)


def speak() -> None:
    for name in ("pipeline.sweep", "launch.entry", "somebody.elses"):
        logger = logging.getLogger(name)
        logger.debug("debug of %s", name)
        logger.info("info of %s", name)
        logger.warning("warning of %s", name)
        logger.error("error of %s", name)


def heard(capsys: pytest.CaptureFixture[str]) -> set[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return {line.partition("] ")[2] for line in captured.err.splitlines()}


def test_rank_0_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0)
    speak()
    assert heard(capsys) == {
        *(f"{x} of pipeline.sweep" for x in ("info", "warning", "error")),
        *(f"{x} of launch.entry" for x in ("info", "warning", "error")),
        "error of somebody.elses",
    }


def test_other_ranks_speak_only_for_errors(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(3)
    speak()
    logging.getLogger("pipeline").error("the prefix")
    text = capsys.readouterr().err
    assert "error of pipeline.sweep" in text
    assert "warning of" not in text
    assert "info of" not in text
    assert "[rank 3] the prefix" in text


def test_verbose_lets_everybody_speak(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, verbose=True)
    speak()
    said = heard(capsys)
    assert "debug of pipeline.sweep" in said
    assert "info of somebody.elses" in said
    assert "debug of somebody.elses" not in said


def test_setting_up_twice_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0)
    set_up_logging(0)
    logging.getLogger("pipeline").info("once")
    assert capsys.readouterr().err.count("once") == 1
