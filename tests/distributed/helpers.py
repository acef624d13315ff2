"""Runs a test function on several real processes that share a gloo group.

    def total(rank: int, start: int) -> float:
        value = torch.tensor(float(start + rank))
        dist.all_reduce(value)
        return value.item()

    assert run_ranks(total, 2, 10) == [21.0, 21.0]

Processes are forked (closures work as rank functions, start-up is a few milliseconds), unless CUDA
is initialised in the caller: then they are spawned and the function must be importable.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_LAST_WORDS_S = 5.0


class RankError(AssertionError):
    """A rank failed; the message holds its own traceback (or the signal that ended it)."""

    def __init__(self, rank: int, world: int, report: str) -> None:
        super().__init__(f"rank {rank} of {world} failed:\n{report}")
        self.rank = rank
        self.report = report


class RanksTimeoutError(AssertionError):
    """Some ranks did not end in time; the message shows where each of them stood."""


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[Any]:
    """Calls function(rank, *args, **kwargs) on `world` processes; returns its values by rank.

    RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set as torchrun sets them, and the default
    process group (gloo) is up. The first rank that fails ends all others. Values must pickle.

    Raises:
        RankError: A rank raised or died; of several, the one that failed first.
        RanksTimeoutError: Not all ranks had ended after `timeout` seconds.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    with tempfile.TemporaryDirectory(prefix="layersweep-ranks-") as folder:
        processes = [
            context.Process(
                target=_rank_main,
                args=(function, rank, world, Path(folder), timeout, args, kwargs),
                name=f"rank-{rank}",
            )
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            _await(processes, Path(folder), timeout)
        finally:
            _kill(processes)
        return [
            pickle.loads((Path(folder) / f"{rank}.value").read_bytes()) for rank in range(world)
        ]


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _await(processes: list[BaseProcess], folder: Path, timeout: float) -> None:
    """Returns when every process has ended well; raises on the first that has not."""
    deadline = time.monotonic() + timeout
    running = list(processes)
    while running:
        ready = wait([process.sentinel for process in running], deadline - time.monotonic())
        if not ready:
            raise RanksTimeoutError(_describe_hang(processes, running, folder, timeout))
        ended = [process for process in running if process.sentinel in ready]
        for process in ended:
            process.join()
        if any(process.exitcode for process in ended):
            raise _first_failure(processes, ended, folder)
        running = [process for process in running if process not in ended]


def _first_failure(
    processes: list[BaseProcess], ended: list[BaseProcess], folder: Path
) -> RankError:
    """Blames the rank that raised first: its peers fail too, by losing their connection."""
    dead = [process for process in ended if process.exitcode and process.exitcode < 0]
    if dead:
        name = signal.Signals(-(dead[0].exitcode or 0)).name
        return RankError(processes.index(dead[0]), len(processes), f"ended by {name}")
    running = [process.sentinel for process in processes if process not in ended]
    if running and not any(folder.glob("*.failure")):
        # Ranks of a guarded run end each other: the one that raised may be about to say so.
        wait(running, _LAST_WORDS_S)
    failures = [
        (*pickle.loads(path.read_bytes()), int(path.stem)) for path in folder.glob("*.failure")
    ]
    if not failures:
        lost = next(process for process in ended if process.exitcode)
        report = f"exited with status {lost.exitcode} and no exception"
        return RankError(processes.index(lost), len(processes), report)
    _, report, rank = min(failures)
    return RankError(rank, len(processes), report)


def _describe_hang(
    processes: list[BaseProcess], running: list[BaseProcess], folder: Path, timeout: float
) -> str:
    for process in running:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    wait([process.sentinel for process in running], 0.5)  # time enough to write a few lines
    ranks = [processes.index(process) for process in running]
    stacks = [f"rank {rank}:\n{(folder / f'{rank}.stack').read_text()}" for rank in ranks]
    return "\n".join([f"ranks {ranks} still ran after {timeout:g} s", *stacks])


def _kill(processes: list[BaseProcess]) -> None:
    """Ends what still runs, with whatever it started itself (each rank leads its own session)."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world: int,
    folder: Path,
    timeout: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Body of one rank: writes RANK.value, or RANK.failure as (time in ns, traceback)."""
    _die_with_parent()
    os.setsid()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        # The loopback device: the host's own name may not resolve.
        GLOO_SOCKET_IFNAME="lo" if sys.platform == "linux" else "lo0",
    )
    torch.set_num_threads(1)
    with (folder / f"{rank}.stack").open("w") as stack:
        # On request of the parent. (A timer would wait for ever for the one pytest had set, whose
        # thread a fork does not copy.)
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
            value = pickle.dumps(function(rank, *args, **kwargs))
            dist.destroy_process_group()
            (folder / f"{rank}.value").write_bytes(value)
        except BaseException:
            failure = pickle.dumps((time.monotonic_ns(), traceback.format_exc()))
            partial = folder / f"{rank}.partial"
            partial.write_bytes(failure)
            partial.rename(folder / f"{rank}.failure")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # no clean-up: it could wait for peers


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
