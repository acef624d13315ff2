"""Whether a process is gone."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.runtime.peers import Peer, has_died, is_alive_here, this_process

ME = this_process(0)


def start() -> tuple["subprocess.Popen[bytes]", Peer]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    started = stat.rpartition(")")[2].split()[19]
    return process, Peer(1, ME.host, process.pid, started, ME.machine)


def test_a_killed_process_has_died_even_unreaped() -> None:
    process, peer = start()
    assert not has_died(peer, ME)
    assert is_alive_here(process.pid)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not has_died(peer, ME):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()
    assert has_died(peer, ME)
    assert not is_alive_here(process.pid)


def test_an_id_that_is_used_again_is_another_process() -> None:
    assert not has_died(ME, ME)
    assert has_died(dataclasses.replace(ME, started="1"), ME)


def test_nothing_is_known_of_other_machines() -> None:
    gone = dataclasses.replace(ME, pid=2**22 + 1)  # above the highest id of Linux
    assert has_died(gone, ME)
    assert not has_died(dataclasses.replace(gone, machine="another"), ME)
    assert not has_died(dataclasses.replace(gone, machine=""), dataclasses.replace(ME, machine=""))


def test_this_process_knows_itself() -> None:
    assert (ME.rank, ME.pid) == (0, os.getpid())
    assert ME.machine
