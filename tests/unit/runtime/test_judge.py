"""Who has died, and who hangs: the one that the others wait for, and not its victims."""

import dataclasses

import pytest

from pipeline.runtime.judge import DIED, Beat, Judge
from pipeline.runtime.life import Phase

BEAT = Beat(1, 10, "forward", 3, 3, 0.0)


def beats(*changes: dict[str, object]) -> list[Beat]:
    return [dataclasses.replace(BEAT, **change) for change in changes]  # type: ignore[arg-type]


def test_a_beat_survives_the_store() -> None:
    assert Beat.decode(BEAT.encode().encode()) == BEAT
    left = dataclasses.replace(BEAT, layer=None, next_layer=None, has_left=True)
    assert Beat.decode(left.encode()) == left


def test_a_rank_without_a_new_beat_is_given_up() -> None:
    judge = Judge(2, 900.0)
    for count in range(1, 11):
        assert judge.judge(beats({"count": count}, {}), [], 1.0, 10.0) is None
    finding = judge.judge(beats({"count": 11}, {}), [], 1.5, 10.0)
    assert finding is not None
    assert (finding.rank, finding.beat.layer) == (1, 3)
    assert finding.cause.startswith("no sign of life for 10 s")


def test_a_rank_that_has_left_is_not_missed() -> None:
    judge = Judge(2, 5.0)
    left = {"has_left": True, "still_s": 99.0, "steps": 1}
    for count in range(1, 30):
        assert judge.judge(beats({"count": count}, left), [1], 1.0, 10.0) is None


def test_a_dead_process_is_found_at_once() -> None:
    finding = Judge(3, 900.0).judge(beats({}, {}, {"phase": "commit"}), [2], 1.0, 60.0)
    assert finding is not None
    assert (finding.rank, finding.cause, finding.beat.phase) == (2, DIED, "commit")


def hung(*changes: dict[str, object]) -> tuple[int, str] | None:
    finding = Judge(len(changes), 60.0).judge(beats(*changes), [], 1.0, 1e9)
    return None if finding is None else (finding.rank, finding.cause)


STILL = {"still_s": 61.0}


def test_the_rank_with_the_fewest_steps_hangs() -> None:
    reads = {**STILL, "steps": 9, "phase": "read"}
    assert hung(STILL, reads, STILL) == (1, "no progress for 1 min: the file system may hang")


def test_nobody_hangs_while_the_last_one_moves() -> None:
    assert hung(STILL, {"steps": 9, "phase": "read", "still_s": 59.0}) is None
    assert hung(STILL, {"still_s": 0.0}) is None


def test_of_equals_the_one_that_stands_still_for_longest() -> None:
    found = hung({**STILL, "still_s": 62.0}, {**STILL, "still_s": 65.0})
    assert found == (
        1,
        "no progress for 1 min: a device, or the network between the ranks, may hang",
    )


def test_ranks_that_merely_wait_do_not_hang() -> None:
    waits = {**STILL, "phase": Phase.wait.value}
    assert hung(waits, waits) is None
    assert hung(waits, {**STILL, "phase": "commit"}) == (
        1,
        "no progress for 1 min: the file system may hang",
    )


@pytest.mark.parametrize(("seconds", "told"), [(900.0, "15 min"), (90.0, "1.5 min"), (3.0, "3 s")])
def test_how_long_is_told(seconds: float, told: str) -> None:
    finding = Judge(1, seconds).judge(beats({"still_s": seconds + 1}), [], 1.0, 1e9)
    assert finding is not None
    assert finding.cause.startswith(f"no progress for {told}: ")
