"""Jobs on the private Slurm: submitted as a user does, watched through scontrol and their log."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch import submit
from tests.slurm.private_slurm import PrivateSlurm

ROOT = Path(__file__).parents[2]
LONG_S = 400.0


class SlurmJob:
    """A job that was submitted from a directory, with output=out."""

    def __init__(self, slurm: PrivateSlurm, directory: Path, number: str) -> None:
        self.slurm, self.directory, self.number = slurm, directory, number
        self.output = directory / "out"
        self.work = directory / "out.partial"

    @property
    def log(self) -> str:
        path = self.directory / "layersweep-jobs" / f"layersweep-out-{self.number}.log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    @property
    def committed(self) -> int:
        return len(list((self.work / "journal").glob("layer-*.commit.json")))

    def wait(self, condition: Callable[[], object], timeout: float = LONG_S) -> None:
        """Waits until something holds; fails with all that is known if it does not."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                found = self.slurm.command("scontrol", "show", "job", self.number)
                pytest.fail(f"waited in vain\n{found}\n{self.log}\n{self.slurm.logs()}")
            time.sleep(0.1)

    def wait_for(self, *states: str, timeout: float = LONG_S) -> str:
        """Waits for one of some states; returns it."""
        self.wait(lambda: self.state in states, timeout)
        return self.state

    def start_now(self, **changes: str) -> None:
        """Spares a job that was queued again the wait of a minute or two.

        Not in the second in which its last start ended: what that one was allowed is then revoked
        for this one too.
        """
        self.wait(lambda: self.state == "PENDING")
        time.sleep(2.0)
        words = [f"{name}={value}" for name, value in changes.items()]
        self.slurm.command("scontrol", "update", f"jobid={self.number}", "StartTime=now", *words)

    def cancel(self, *words: str) -> None:
        self.slurm.command("scancel", *words, self.number)


class Submitter:
    """Types `layersweep-submit` in a directory of its own.

    Args:
        slurm: The cluster.
        directory: To submit from.
        monkeypatch: Of the test.
        capfd: Of the test.
    """

    def __init__(
        self,
        slurm: PrivateSlurm,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        self.slurm, self.directory = slurm, directory
        self._monkeypatch, self._capfd = monkeypatch, capfd
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, *words: str) -> SlurmJob:
        """Submits a job; the words come after those that fit the private cluster."""
        self._monkeypatch.chdir(self.directory)
        for name in ("SLURM_CONF", "PATH"):
            self._monkeypatch.setenv(name, self.slurm.environment[name])
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        small = ["cluster.gpus_per_node=0", "cluster.cpus_per_task=2"]
        self._monkeypatch.setattr(sys, "argv", ["layersweep-submit", *small, *words])
        with pytest.raises(SystemExit) as end:
            submit.main()
        told = self._capfd.readouterr()
        assert end.value.code == 0, told.err
        number = told.out.split("submitted: job ")[1].split()[0]
        return SlurmJob(self.slurm, self.directory, number)


def published(directory: Path) -> dict[str, bytes]:
    """Every file of a finished checkpoint but those of the report that hold times."""
    timed = {"run.json", "metrics.jsonl", "report.html"}
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name not in timed]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def processes_of(directory: Path, word: str, but: Sequence[str] = ()) -> list[int]:
    """Processes that work in a directory and have a word in their command line."""
    found = []
    for place in Path("/proc").iterdir():
        if not place.name.isdecimal():
            continue
        try:
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            here = Path(os.readlink(place / "cwd")) == directory
        except OSError:
            continue
        if here and word in words and not any(other in words for other in but):
            found.append(int(place.name))
    return found
