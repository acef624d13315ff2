"""A real Slurm of two nodes on this machine, in a folder of its own, while a test needs it.

with PrivateSlurm(folder) as slurm:
    slurm.command("squeue")

The daemons live in a PID namespace whose first process dies with this one, by whatever end: the
kernel then kills everything in the namespace, jobs included. No process is left behind, and no
other Slurm on the machine is touched (own ports, own munge key and socket).
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

NODES = ("node1", "node2")
CPUS = 4
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
START_S = 30.0
PR_SET_PDEATHSIG = 1

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs={cpus}
PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""

# The first process of the namespace: it adopts what the daemons leave, and ends with any of them.
INIT = """\
munged --foreground --force --key-file={folder}/munge/key --socket={folder}/munge/socket \\
  --pid-file={folder}/munge/pid --log-file={folder}/munge/log --seed-file={folder}/munge/seed &
while ! [ -S {folder}/munge/socket ]; do sleep 0.1; done
slurmctld -D -c &
slurmd -D -N node1 &
slurmd -D -N node2 &
wait -n
"""


def missing() -> str:
    """Why there can be no private Slurm here; empty if there can."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=SEARCH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)"
    if os.getuid() != 0:
        return "slurmd and munged with keys of their own need root"
    probe = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
    )
    return "" if probe.returncode == 0 else "unshare: no PID namespace may be made here"


class PrivateSlurm:
    """Two idle nodes; a context manager.

    Args:
        folder: Configuration, state and logs; its path must be short (a socket lies in it).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if "SLURM" not in name},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": SEARCH,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Starts the daemons and waits until both nodes are idle."""
        self._write_files()
        with (self.folder / "log" / "init").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"),
                    *("bash", str(self.folder / "init.sh")),
                ],
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )
        try:
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends everything in the namespace."""
        self.stop()

    def stop(self) -> None:
        """Kills the namespace's starter; the kernel kills the rest."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str, cwd: Path | None = None, timeout: float = 60.0) -> str:
        """What a command of Slurm prints; it must succeed."""
        done = subprocess.run(
            words,
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test that fails."""
        ends = (f"== {p.name}\n{p.read_text()[-3000:]}" for p in (self.folder / "log").iterdir())
        return "\n".join(ends)

    def _write_files(self) -> None:
        for name in ("munge", "state", "spool/node1", "spool/node2", "run", "log"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        controller, first, second = _free_ports()
        values = {
            "host": socket.gethostname(),
            "folder": self.folder,
            "port": controller,
            "ports": f"{first},{second}",
            "cpus": CPUS,
        }
        (self.folder / "slurm.conf").write_text(CONF.format(**values))
        (self.folder / "init.sh").write_text(INIT.format(**values))

    def _wait_until_idle(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            found = subprocess.run(
                ["timeout", "5", "sinfo", "--noheader", "--Node", "--format=%T"],
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            states = found.stdout.split()
            if states and set(states) == {"idle"}:
                return
            time.sleep(0.2)
        raise AssertionError(f"the nodes are not idle after {START_S} s\n{self.logs()}")


def _free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(3)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return sorted(item.getsockname()[1] for item in sockets)
    finally:
        for item in sockets:
            item.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
