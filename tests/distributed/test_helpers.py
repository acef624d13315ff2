import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.helpers import RankError, RanksTimeoutError, run_ranks


def test_values_come_back_in_rank_order_over_a_real_group() -> None:
    def total(rank: int, start: int, *, scale: int) -> tuple[int, float, torch.Tensor]:
        value = torch.tensor([float(start + rank)])
        dist.all_reduce(value)
        time.sleep(0.05 * (2 - rank))
        return rank, value.item() * scale, value

    values = run_ranks(total, 3, 10, scale=2)
    assert [rank for rank, _, _ in values] == [0, 1, 2]
    assert [scaled for _, scaled, _ in values] == [66.0] * 3
    assert values[2][2].tolist() == [33.0]


def test_ranks_see_what_torchrun_would_set() -> None:
    def variables(rank: int) -> list[str]:
        return [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]

    assert run_ranks(variables, 2) == [["0", "0", "2"], ["1", "1", "2"]]
    assert "RANK" not in os.environ


def test_first_failure_is_the_one_reported_and_ends_the_rest_quickly(tmp_path: Path) -> None:
    def fail_on_one(rank: int) -> None:
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        dist.barrier()
        if rank == 1:
            raise ValueError("no such layer: 17")
        dist.barrier()  # rank 0 loses its peer here, rank 2 perhaps later

    start_s = time.monotonic()
    with pytest.raises(RankError, match="ValueError: no such layer: 17") as caught:
        run_ranks(fail_on_one, 3, timeout=30)
    assert time.monotonic() - start_s < 10
    assert caught.value.rank == 1
    assert "fail_on_one" in caught.value.report
    assert all(_is_gone(int(path.read_text())) for path in tmp_path.iterdir())


def test_a_rank_that_is_killed_is_named_with_its_signal() -> None:
    def die(rank: int) -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    with pytest.raises(RankError, match="rank 0 of 2 failed:\nended by SIGKILL"):
        run_ranks(die, 2, timeout=20)


def test_timeout_kills_every_rank_and_its_children_and_shows_where_they_stood(
    tmp_path: Path,
) -> None:
    def hang_forever(rank: int) -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / f"{rank}").write_text(f"{os.getpid()} {child.pid}")
        if rank == 0:
            child.wait()

    with pytest.raises(RanksTimeoutError, match=r"ranks \[0\] still ran after 2 s") as caught:
        run_ranks(hang_forever, 2, timeout=2)
    assert "hang_forever" in str(caught.value)
    pids = [int(pid) for pid in (tmp_path / "0").read_text().split()]
    assert all(_is_gone(pid) for pid in pids)
    os.kill(int((tmp_path / "1").read_text().split()[1]), signal.SIGKILL)


def test_a_value_that_does_not_pickle_is_an_error_of_that_rank() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed"):
        run_ranks(lambda rank: (lambda: rank) if rank == 1 else rank, 2)


def test_spawned_ranks_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert run_ranks(_world_size, 1) == [(0, 1)]


def _world_size(rank: int) -> tuple[int, int]:
    return rank, dist.get_world_size()


def _is_gone(pid: int) -> bool:
    """Whether the process has ended (an unreaped zombie counts: it holds nothing)."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
