"""One answer for all ranks at the end of a layer."""

import torch.distributed as dist

from pipeline.runtime.stop import Reason, Stop
from tests.distributed.helpers import run_ranks


def test_the_weightiest_reason_stays() -> None:
    stop = Stop()
    assert not stop.agreed(0)
    stop.ask(Reason.sigterm)
    stop.ask(Reason.file)
    assert stop.agreed(1)
    assert (stop.reason, stop.layer) == (Reason.sigterm, 1)


def test_one_rank_is_enough() -> None:
    def ask(rank: int) -> list[tuple[bool, str]]:
        stop = Stop(dist.group.WORLD)
        answers = [(stop.agreed(0), stop.reason.value)]
        if rank == 2:
            stop.ask(Reason.sigusr1)
        answers.append((stop.agreed(1), stop.reason.value))
        return answers

    assert run_ranks(ask, 3) == [[(False, ""), (True, "SIGUSR1")]] * 3
