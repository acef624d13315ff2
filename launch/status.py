"""`layersweep-status`: what the files of a job tell: is it running, and where; why did it end?

    python -m launch.status DIR [output=json]

DIR is OUTPUT or OUTPUT.partial. Exit status: 0 finished, 75 stopped (the same command goes on),
3 running, 4 dead, 1 missed a gate, 2 refused, or nothing there.

Hydra and torch are left alone: their imports would take longer than the answer. The options are
those of conf/job/status.yaml all the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.cluster.describe import describe
from pipeline.cluster.options import StatusConfig, StatusOutput
from pipeline.cluster.run_files import read_run
from pipeline.cluster.status import judge, to_values
from pipeline.errors import ConfigError

OPTIONS = Path(__file__).resolve().parent.parent / "conf" / "job" / "status.yaml"
REFUSED = 2


def main() -> NoReturn:
    """Console command."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        sys.stdout.write(f"{__doc__}\n{OPTIONS.read_text(encoding='utf-8')}")
        sys.exit(0)
    try:
        config = read_options(words)
    except ConfigError as error:
        sys.stderr.write(f"layersweep: error: {error}\n")
        sys.exit(REFUSED)
    sys.exit(show_status(config))


def read_options(words: Sequence[str]) -> StatusConfig:
    """The options of a command line.

    Raises:
        ConfigError: An unknown option, a value of another type, or no directory.
    """
    known = OmegaConf.load(OPTIONS)
    names = [str(name) for name in known]
    options = "options are " + ", ".join(f"{name}=" for name in names)
    given = [word for word in words if word.partition("=")[0] in names and "=" in word]
    others = [word for word in words if word not in given]
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(StatusConfig), known, OmegaConf.from_dotlist(given)
        )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(
            " ".join(given),
            value=str(error).splitlines()[0],
            rule=options,
            remedy="see layersweep-status --help",
        ) from error
    assert isinstance(config, StatusConfig)
    if config.directory is None and others:
        config.directory = others.pop(0)
    if others or config.directory is None:
        raise ConfigError(
            "layersweep-status",
            value=" ".join(others) or "no directory",
            rule=f"takes one directory; {options}",
            remedy="layersweep-status OUTPUT",
        )
    return config


def show_status(config: StatusConfig) -> int:
    """Writes what is known to stdout; returns the exit status."""
    assert config.directory is not None
    status = judge(read_run(Path(config.directory)), time.time(), started_at=config.started_at)
    if config.output is StatusOutput.json:
        sys.stdout.write(json.dumps(to_values(status), indent=2) + "\n")
    else:
        sys.stdout.write(describe(status))
    sys.stdout.flush()
    return status.exit_status


if __name__ == "__main__":
    main()
