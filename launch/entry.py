"""What the entry points share: where conf/ lies, this process's place, errors to exit statuses.

Exit statuses: 0 done, 1 the audit found problems or a gate was missed, 2 refused (the message says
why), 3 a fault (an unexpected one with a traceback), 75 stopped: the same command goes on, 130
interrupted.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pipeline.config import register_schemas
from pipeline.errors import JointError, LayersweepError
from pipeline.preparation import Place
from pipeline.runtime.endings import UNEXPECTED, Status, describe, is_lost_connection
from pipeline.runtime.launcher import tell_torchrun

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
JOBS_DIR = CONF_DIR / "job"

# Where the ranks have no common store yet, or no work directory. Other ranks than 0 wait this long
# before they report: rank 0 usually fails for the same reason and says so, and the launcher then
# ends the others, so that the user reads one message.
OTHERS_WAIT_S = 5.0
# Ranks whose connection broke are victims of another rank's fault.
VICTIMS_WAIT_S = 20.0


def launch(job: str, action: Callable[[DictConfig, Place], int]) -> None:
    """Composes the options of a job from conf/job/ and the command line, and runs it.

    Args:
        job: Name of its file in conf/job/.
        action: Takes the composed options; returns the exit status.
    """
    # Segments of device memory that grow: layers of different kinds then share what is cached.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    register_schemas(CONF_DIR)
    composed_well, statuses = False, []

    @hydra.main(version_base=None, config_path=str(JOBS_DIR), config_name=job)
    def compose(composed: DictConfig) -> None:
        nonlocal composed_well
        composed_well = True
        place = place_of_process()
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            statuses.append(attempt(lambda: action(composed, place), place))
            if statuses[-1] in (Status.stopped, Status.interrupted):
                sys.exit(statuses[-1])  # nor are the jobs after it wanted now
        else:
            run(lambda: action(composed, place), place)

    try:
        compose()
        sys.exit(max(statuses, default=0))  # of a multirun, the worst
    except SystemExit as end:
        # Hydra itself says what is wrong with an option, and exits with 1.
        sys.exit(Status.refused if end.code == 1 and not composed_well else end.code)


def place_of_process() -> Place:
    """This process among the ranks, as torchrun (or Slurm's srun) tells through the environment."""
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if "MASTER_ADDR" in os.environ and rank in os.environ and world in os.environ:
            return Place(
                int(os.environ[rank]), int(os.environ[world]), int(os.environ.get(local, 0))
            )
    return Place()


def run(action: Callable[[], int], place: Place) -> None:
    """Calls `action`, reports what goes wrong, and exits with its status."""
    status = attempt(action, place)
    if status and place.world > 1:
        os._exit(status)  # no waiting for collectives that other ranks will never join
    sys.exit(status)


def attempt(action: Callable[[], int], place: Place) -> int:
    """Calls `action`, reports what goes wrong, and returns its status."""
    try:
        status = action()
    except KeyboardInterrupt:
        _say(
            "layersweep: interrupted; the same command goes on from the last finished layer "
            "(a rehearsal begins anew)"
        )
        status = Status.interrupted
    except Exception as error:
        status = _report(error, place)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _report(error: Exception, place: Place) -> int:
    """Says what went wrong; returns the exit status."""
    _, cause, status = describe(error)
    if status != Status.fault:
        if place.rank != 0:
            time.sleep(OTHERS_WAIT_S)
        is_joint = isinstance(error, JointError)
        who = f" (rank {place.rank})" if place.world > 1 and not is_joint else ""
        if not is_joint or place.rank == 0:
            text = error if isinstance(error, LayersweepError) else cause
            _say(f"layersweep: error{who}: {text}")
    elif place.world > 1 and is_lost_connection(error):
        time.sleep(VICTIMS_WAIT_S)
        _say(
            f"layersweep: rank {place.rank} lost its connection: another rank ended "
            "(its own message says why). The same command goes on from the last finished layer"
        )
    elif cause.startswith(UNEXPECTED):
        _say(f"layersweep: {UNEXPECTED} on rank {place.rank}")
        traceback.print_exc()
    else:
        _say(f"layersweep: failed: rank {place.rank}: {cause}")
    tell_torchrun(cause, time.time())
    return status


def take_positional() -> str | None:
    """Takes the first word that is no option out of the command line."""
    word, sys.argv[1:] = split_positional(sys.argv[1:])
    return word


def split_positional(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The first word of a command line that is no option, and the others."""
    for index, word in enumerate(words):
        if word.startswith("-") or (index and words[index - 1].startswith("--config")):
            continue
        if "=" not in word or Path(word).is_dir():
            return word, [*words[:index], *words[index + 1 :]]
    return None, list(words)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
