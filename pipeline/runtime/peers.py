"""The processes of a run: who they are, and whether one that should live is gone.

In: process ids of ranks. Out: certainty that a rank of the same machine has died; of other machines
nothing is known here.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Peer:
    """One rank's process.

    Attributes:
        rank: Among all ranks.
        host: Name of its host.
        pid: Its process id.
        started: When it started, as its kernel says: ids are used again.
        machine: Kernel and namespace of the id: two containers may share a host's name.
    """

    rank: int
    host: str
    pid: int
    started: str
    machine: str


def this_process(rank: int) -> Peer:
    """Who this process is."""
    state, started = _look_up(os.getpid())
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink(_PROC / 'self/ns/pid')}" if state else ""
    except OSError:
        machine = ""
    return Peer(rank, socket.gethostname(), os.getpid(), started, machine)


def has_died(peer: Peer, me: Peer) -> bool:
    """Whether a peer's process is certainly gone (a zombie is)."""
    if not peer.machine or peer.machine != me.machine:
        return False
    state, started = _look_up(peer.pid)
    return state in ("", "Z", "X") or started != peer.started


def is_alive_here(pid: int) -> bool:
    """Whether this machine has a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _look_up(pid: int) -> tuple[str, str]:
    """State and start time of a process (fields 3 and 22 of proc_pid_stat(5)); empty without it."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the program's name may hold anything
    return fields[0], fields[19]
