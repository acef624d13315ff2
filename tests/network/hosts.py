"""Two hosts on one machine: network namespaces joined by a cable that can be pulled.

with two_hosts() as hosts:
    runs = [hosts.start(node, command, log) for node, log in enumerate(logs)]
    hosts.cut()

Each host has its own network, host name and process ids, so that a process on one knows nothing of
those on the other, and shares the file system. Needs root.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STRAGGLERS_S = 5
"""For processes to go once the launcher has ended; what is left then, is left."""
# Process 1 of the host: when it ends, the kernel ends whatever is left, so it looks first.
_INIT = f"""
hostname "$1"; shift
"$@"; status=$?
for _ in $(seq {STRAGGLERS_S}0); do
  left=""
  for entry in /proc/[0-9]*; do
    test "${{entry#/proc/}}" = 1 || left="$left $(tr '\\0' ' ' < "$entry/cmdline" 2>/dev/null)"
  done
  left=$(echo $left)
  test -z "$left" && break
  sleep 0.1
done
test -z "$left" || echo "LEFT: $left"
exit $status
"""


@dataclass(frozen=True)
class Hosts:
    """Both of them.

    Attributes:
        names: Of their namespaces, and of themselves.
        interfaces: The ends of the cable.
        addresses: Of these.
    """

    names: tuple[str, str]
    interfaces: tuple[str, str]
    addresses: tuple[str, str]

    def start(self, node: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a command on a host; stdout and stderr go to a file."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": self.interfaces[node],
            "TP_SOCKET_IFNAME": self.interfaces[node],
        }
        with log.open("wb") as file:
            return subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{self.names[node]}"),
                    *("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("bash", "-c", _INIT, "host", self.names[node], *command),
                ],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def torchrun(self, node: int, *words: str) -> list[str]:
        """The command of one node of two, with one rank each.

        The static rendezvous: the other one's agent waits for its dead connection.
        """
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--node-rank", f"{node}", "--nproc-per-node", "1"),
            *("--master-addr", self.addresses[0], "--master-port", "29411"),
            *("-m", *words),
        ]

    def cut(self) -> None:
        """Pulls the cable: packets get lost, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", self.interfaces[0], "down")

    def mend(self) -> None:
        """Puts it back."""
        _ip("-n", self.names[0], "link", "set", self.interfaces[0], "up")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Makes the hosts, and takes them away."""
    mark = secrets.token_hex(3)
    hosts = Hosts(
        (f"ls-{mark}-a", f"ls-{mark}-b"),
        (f"ls{mark}a", f"ls{mark}b"),
        ("10.91.83.1", "10.91.83.2"),
    )
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        first, second = (
            ("link", "add", hosts.interfaces[0], "netns", hosts.names[0], "type", "veth"),
            ("peer", "name", hosts.interfaces[1], "netns", hosts.names[1]),
        )
        _ip(*first, *second)
        for name, interface, address in zip(
            hosts.names, hosts.interfaces, hosts.addresses, strict=True
        ):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", interface, "up")
        yield hosts
    finally:
        for name in hosts.names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a host, with everything on it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}"
    try:
        with two_hosts():
            return ""
    except subprocess.CalledProcessError as problem:
        return f"{problem.cmd}: {problem.stderr}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
