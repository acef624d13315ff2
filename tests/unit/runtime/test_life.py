"""Where a rank is, and for how long it has stood still."""

from pathlib import Path

import pytest

from pipeline.runtime import life as module
from pipeline.runtime.life import Life, Phase, Pulse


def test_an_error_keeps_the_place_where_it_was_raised() -> None:
    life = Life()
    life.enter(Phase.forward, 3)
    with life.during(Phase.wait, 3):
        assert life.at == (Phase.wait, 3)
    assert life.at == (Phase.forward, 3)
    with pytest.raises(ValueError, match="x"), life.during(Phase.commit, 2):
        raise ValueError("x")
    assert (life.phase, life.layer) == (Phase.commit, 2)


def test_every_change_is_a_step() -> None:
    life = Life()
    life.enter(Phase.read, 0)
    life.advance()
    with life.during(Phase.wait, 0):
        pass
    life.layer_done(0, {"left_s": 1.0})
    assert (life.steps, life.done, life.figures) == (5, 1, {"left_s": 1.0})


def test_the_layer_with_which_a_restart_goes_on() -> None:
    life = Life()
    assert life.next_layer is None
    life.todo = [2, 5]
    life.layer_done(0, {})
    assert life.next_layer == 2
    life.layer_done(2, {})
    assert life.next_layer == 5
    life.layer_done(5, {})
    assert life.next_layer == -1


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    figures = {"bytes": 0.0, "cpu_s": 0.0}
    monkeypatch.setattr(module, "_bytes_moved", lambda: figures["bytes"])
    monkeypatch.setattr(module, "_cpu_seconds", lambda: figures["cpu_s"])
    return figures


def test_a_rank_stands_still_from_its_last_step(moved: dict[str, float]) -> None:
    life = Life()
    pulse = Pulse(life, counts_cpu=True)
    pulse.tick(1.0)
    assert pulse.still_s == 0.0
    pulse.tick(1.0)
    pulse.tick(2.5)
    assert pulse.still_s == 3.5
    life.advance()
    pulse.tick(1.0)
    assert pulse.still_s == 0.0


def test_moving_bytes_are_no_standstill(moved: dict[str, float]) -> None:
    pulse = Pulse(Life(), counts_cpu=False)
    for _ in range(3):
        moved["bytes"] += 1e6
        pulse.tick(1.0)
        assert pulse.still_s == 0.0
    moved["bytes"] += 1000  # log lines and signs of life
    pulse.tick(1.0)
    assert pulse.still_s == 1.0


@pytest.mark.parametrize(("counts_cpu", "still_s"), [(True, 0.0), (False, 2.0)])
def test_computing_counts_on_a_cpu_alone(
    counts_cpu: bool, still_s: float, moved: dict[str, float]
) -> None:
    pulse = Pulse(Life(), counts_cpu=counts_cpu)
    for _ in range(3):
        moved["cpu_s"] += 0.9
        pulse.tick(1.0)
    assert pulse.still_s == still_s


def test_bytes_that_this_process_moves_are_counted(tmp_path: Path) -> None:
    before = module._bytes_moved()
    (tmp_path / "data").write_bytes(bytes(1_000_000))
    assert module._bytes_moved() - before >= 1_000_000
