"""The moment in which ranks connect: a clear word where the network does not let them.

In: the calls that build process groups and send their first messages. Out: a `ClusterError` for
what the backends raise; and where they hang, as NCCL does behind a firewall, an end of the process
after some minutes instead of the hour that a collective may take.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from pipeline.errors import ClusterError
from pipeline.runtime.endings import Status, is_lost_connection
from pipeline.runtime.launcher import tell_torchrun

CONNECT_S = 600.0
"""The ranks have met, so they are all here; what they still import takes minutes at most."""
OTHERS_LATER_S = 5.0
"""So that rank 0 speaks, and a launcher ends the others."""


@contextmanager
def connecting(
    rank: int, world: int, limit_s: float = CONNECT_S, leave: Callable[[int], object] = os._exit
) -> Iterator[None]:
    """Inside, the ranks connect.

    Args:
        rank: This rank.
        world: Number of ranks; a single one connects to nobody.
        limit_s: How long they may take.
        leave: Ends the process.

    Raises:
        ClusterError: They cannot.
    """

    def give_up() -> None:
        text = str(_fault(f"no connection after {limit_s:.0f} s"))
        sys.stderr.write(f"layersweep: error (rank {rank}): {text}\n")
        sys.stderr.flush()
        tell_torchrun(text, 0.0)
        leave(Status.refused)

    timer = threading.Timer(limit_s + (OTHERS_LATER_S if rank else 0.0), give_up)
    timer.daemon = True
    if world > 1:
        timer.start()
    try:
        yield
    except RuntimeError as problem:
        if isinstance(problem, dist.DistError) or is_lost_connection(problem):
            raise _fault(_first_line(problem)) from problem
        raise
    finally:
        timer.cancel()


def _fault(value: str) -> ClusterError:
    return ClusterError(
        "connecting the ranks",
        value=value,
        rule="every rank must reach every other one over the network (where one has ended "
        "meanwhile, its own message says why)",
        remedy="name the interface between the hosts with GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME, and let it through the firewall; NCCL_DEBUG=INFO tells more",
    )


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:300]
