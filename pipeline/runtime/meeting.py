"""Where the ranks meet before they are connected: what each one found, told to all.

In: what a rank has to tell. Out: on rank 0 what everybody told, or who has not come; then rank 0's
answer on all ranks. It needs no process group, only the store by which groups are made later, so a
rank that cannot go on is heard too, and none waits for it in vain.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import ClusterError

logger = logging.getLogger(__name__)

JOIN_S = 600.0
"""For the other ranks, after rank 0 is ready: imports from a network file system take minutes."""
HEARD_S = 10.0
"""For the others to hear the answer: rank 0 may hold the store."""
SPEAK_S = 30.0


class Meeting:
    """One meeting of all ranks; every rank makes the same calls.

    Args:
        rank: This rank.
        world: Number of ranks.
        answer_s: Seconds after which rank 0, which tokenizes first, is no longer waited for.

    Raises:
        ClusterError: The place where the ranks meet is not reached.
    """

    def __init__(self, rank: int, world: int, answer_s: float = 3600.0) -> None:
        self._rank, self._world, self._answer_s = rank, world, answer_s
        store = _open_store(rank, world)
        with _reaching_rank_0():
            # Several jobs of one process meet one after the other.
            number = store.add(f"layersweep/meetings/{rank}", 1)
        self._store: Any = dist.PrefixStore(  # type: ignore[attr-defined]
            f"layersweep/meeting/{number}", store
        )

    def announce(self, value: Any) -> None:
        """Rank 0 tells something in advance."""
        self._store.set("announced", pickle.dumps(value))

    def announced(self) -> Any:
        """What rank 0 has told in advance; waits for it."""
        return self._wait_for("announced")

    def tell(self, value: Any) -> None:
        """Puts on the table what this rank has found."""
        with _reaching_rank_0():
            self._store.set(f"told/{self._rank}", pickle.dumps(value))

    def hear(self, join_s: float = JOIN_S) -> dict[int, Any]:
        """On rank 0: what the ranks told, without those that have not come after `join_s`."""
        keys = {f"told/{rank}": rank for rank in range(self._world)}
        end = time.monotonic() + join_s
        while keys and time.monotonic() < end:
            try:
                wait_s = min(SPEAK_S, max(end - time.monotonic(), 0.01))
                self._store.wait(list(keys), timedelta(seconds=wait_s))
                break
            except RuntimeError:  # what a store raises when time is up
                missing = [rank for key, rank in keys.items() if not self._store.check([key])]
                if missing and time.monotonic() < end:
                    logger.info("waiting for %s of %d", name_ranks(missing), self._world)
        return {
            rank: pickle.loads(self._store.get(key))
            for key, rank in keys.items()
            if self._store.check([key])
        }

    def answer(self, value: Any, ranks: Iterable[int]) -> dict[int, float]:
        """Rank 0 tells all ranks what follows, and waits a little until they have heard it.

        Args:
            value: What is told.
            ranks: Who has come.

        Returns:
            By rank, by how many seconds its clock is ahead of this one.
        """
        now = time.time()
        self._store.set("answer", pickle.dumps(value))
        keys = {f"heard/{rank}": rank for rank in ranks if rank != self._rank}
        with suppress(RuntimeError):  # who has not heard it by now will not
            self._store.wait(list(keys), timedelta(seconds=HEARD_S))
        return {
            rank: float(self._store.get(key)) - now
            for key, rank in keys.items()
            if self._store.check([key])
        }

    def answered(self) -> Any:
        """What rank 0 said; waits for it."""
        answer = self._wait_for("answer")
        with suppress(RuntimeError):  # rank 0 need not have waited
            self._store.set(f"heard/{self._rank}", f"{time.time()}")
        return answer

    def _wait_for(self, key: str) -> Any:
        with _reaching_rank_0():
            self._store.wait([key], timedelta(seconds=self._answer_s))
            return pickle.loads(self._store.get(key))


@contextmanager
def _reaching_rank_0() -> Iterator[None]:
    """What a store raises inside is the silence of the process that holds it."""
    try:
        yield
    except RuntimeError as problem:
        raise ClusterError(
            "rank 0",
            value=f"no answer ({_first_line(problem)})",
            rule="it holds what the ranks tell each other before they start",
            remedy="its own message says why; then start the same command again",
        ) from problem


def can_meet() -> bool:
    """Whether anything tells where the ranks meet: a process group, or the launcher."""
    return dist.is_initialized() or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def name_ranks(ranks: list[int]) -> str:
    """Ranks with runs joined: `"ranks 0-3, 7"`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _open_store(rank: int, world: int) -> Any:
    if world == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    try:
        timeout = timedelta(seconds=JOIN_S)
        store, _, _ = next(iter(rendezvous("env://", rank, world, timeout=timeout)))
    except (RuntimeError, ValueError) as problem:
        where = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
        raise ClusterError(
            f"the ranks' meeting point {where} (MASTER_ADDR, MASTER_PORT)",
            value=f"not reached ({_first_line(problem)})",
            rule="every rank must reach it over the network",
            remedy="check the address, that nothing else uses the port, and firewalls; "
            "rank 0 or its launcher may have ended too: its own message says why",
        ) from problem
    return store


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:200]
