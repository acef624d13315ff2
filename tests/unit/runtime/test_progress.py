"""Progress: one line per interval, the last layer always, silent ranks silent."""

import logging
import re

import pytest
import torch

from pipeline.runtime import progress
from pipeline.runtime.progress import Progress, peak_memory_gib

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def run(clock: Clock, layers: int, seconds: float, **options: object) -> None:
    values = {"interval_s": 5.0, "enabled": True} | options
    meter = Progress(layers, 2000, CPU, **values)  # type: ignore[arg-type]
    for layer in range(layers):
        clock.now += seconds
        meter.layer_done(layer, "moe", phase="calibrate", experts=", experts seen 3/4")


def test_one_line_per_interval_and_one_at_the_end(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(clock, 10, 2.0)
    spoken = [int(re.search(r"(\d+)/10", line)[1]) for line in lines(caplog)]  # type: ignore[index]
    assert spoken == [1, 4, 7, 10]


def test_a_line_says_it_all(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(clock, 4, 30.0)
    first, *_, last = lines(caplog)
    # 2000 tokens through a quarter of the layers in 30 s; three times 30 s to go.
    assert re.fullmatch(
        r"calibrate: layer 0 \(moe\), 1/4, 17 tok/s, peak \d+\.\d\d GiB, experts seen 3/4, "
        r"1 min 30 s left",
        first,
    )
    assert last.endswith("0 s left")


def test_the_speed_is_that_through_the_whole_model(clock: Clock) -> None:
    """A restart that visits the last two of ten layers is no faster for it."""
    records: list[dict[str, object]] = []
    meter = Progress(
        10, 2000, CPU, interval_s=5.0, enabled=True, record=lambda **f: records.append(f)
    )
    meter.layers = 2
    for layer in (8, 9):
        clock.now += 20.0
        meter.layer_done(layer, "moe", phase="calibrate")
    assert [record["tokens_per_s"] for record in records] == [10.0, 10.0]
    assert [record["left_s"] for record in records] == [20.0, 0.0]


def test_other_ranks_are_silent(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(clock, 3, 10.0, enabled=False)
    assert lines(caplog) == []


def test_no_speed_without_tokens(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    meter = Progress(1, 0, CPU, interval_s=5.0, enabled=True)
    clock.now += 1.0
    meter.layer_done(0, "mamba", phase="calibrate")
    (line,) = lines(caplog)
    assert "tok/s" not in line
    assert line.startswith("calibrate: layer 0 (mamba), 1/1, peak ")


def test_peak_memory_is_plausible() -> None:
    assert 0.01 < peak_memory_gib(CPU) < 1000


def test_every_layer_is_recorded_whether_spoken_of_or_not(clock: Clock) -> None:
    records: list[dict[str, object]] = []
    run(clock, 10, 2.0, record=lambda **figures: records.append(figures))
    assert [record["layer"] for record in records] == list(range(10))
    assert [record["done"] for record in records] == list(range(1, 11))
    assert (records[4]["tokens_per_s"], records[4]["left_s"]) == (100.0, 10.0)
    silent: list[dict[str, object]] = []
    run(clock, 3, 2.0, enabled=False, record=lambda **figures: silent.append(figures))
    assert silent == []
