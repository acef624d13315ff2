"""What the tests of batch scripts share: jobs, and commands that stand in for the cluster's.

`run_script` runs a rendered script under bash. `srun`, `scontrol`, `squeue` and the interpreter are
small scripts of the test, found first on PATH; each notes how it was called.
"""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cluster.options import ContainerConfig, JobName, SlurmConfig
from pipeline.cluster.script import SubmittedJob, render

PYTHON = "/opt/layersweep/bin/python"
WORDS = ("checkpoint=/models/Ultra-BF16", "output=/models/Ultra-NVFP4", "parallel.ep=16")


def make_job(**values: Any) -> SubmittedJob:
    defaults: dict[str, Any] = {
        "name": JobName.calibrate,
        "words": WORDS,
        "directory": Path("/data/jobs"),
        "output": Path("/models/Ultra-NVFP4"),
    }
    return SubmittedJob(**{**defaults, **values})


def make_config(**values: Any) -> SlurmConfig:
    container = values.pop("container", {})
    return SlurmConfig(container=ContainerConfig(**container), **values)


@dataclass
class Stage:
    """A folder in which a script runs, with its stand-ins.

    Attributes:
        folder: Holds the submit directory, the stand-ins and the notes of their calls.
        srun: Body of the stand-in for srun, in bash; $here is the folder.
        verdict: What launch.status exits with.
        queue: What squeue prints.
    """

    folder: Path
    srun: str = "exit 1"
    verdict: int = 75
    queue: str = "RUNNING None"
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.folder / "out.partial"

    def job(self, *words: str, **values: Any) -> SubmittedJob:
        place = {"directory": self.folder, "output": self.folder / "out", "words": words}
        return make_job(**{**place, **values})

    def start(self, script: str) -> subprocess.Popen[str]:
        """Starts a script as Slurm would on the first node."""
        stand_ins = self.folder / "bin"
        stand_ins.mkdir(exist_ok=True)
        note = 'here="$(dirname "$0")/.."\nprintf "%s\\0" "$@" >> "$here/$(basename "$0").calls"\n'
        bodies = {
            "srun": note + self.srun,
            "scontrol": note,
            "squeue": f"echo '{self.queue}'",
            "sleep": f"exec {_which('sleep')} 0.05",
            "python": note + f"echo last words; exit {self.verdict}",
        }
        for name, body in bodies.items():
            path = stand_ins / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        path = self.folder / "script.sh"
        path.write_text(script)
        environment = {
            **os.environ,
            "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "12345678",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "4",
            **self.variables,
        }
        return subprocess.Popen(
            ["bash", str(path)],
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, config: SlurmConfig | None = None, *words: str, **values: Any) -> tuple[int, str]:
        """Renders a script and runs it to its end; its exit status and output."""
        config = config or make_config()
        process = self.start(render(self.job(*words, **values), config, str(self.python)))
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def calls(self, name: str) -> list[str]:
        """The words that a stand-in was called with, all calls in a row."""
        path = self.folder / f"{name}.calls"
        return path.read_bytes().decode().split("\0")[:-1] if path.exists() else []


def _which(name: str) -> str:
    return next(
        path for folder in ("/usr/bin", "/bin") if Path(path := f"{folder}/{name}").exists()
    )
