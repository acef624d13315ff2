"""What the entry points share: where conf/ lies, this process's place, errors to exit statuses.

Exit statuses: 0 done, 1 the audit found problems or a gate was missed, 2 refused (the message says
why), 3 an unexpected fault (with a traceback).
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pipeline.config import register_schemas
from pipeline.errors import AuditError, LayersweepError
from pipeline.preparation import Place

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
JOBS_DIR = CONF_DIR / "job"

AUDIT_FAILED, REFUSED, FAULT, INTERRUPTED = 1, 2, 3, 130
GATE_MISSED = 1

# Other ranks than 0 wait this long before they report: rank 0 usually fails for the same reason
# and says so, and the launcher then ends the others, so that the user reads one message.
OTHERS_WAIT_S = 5.0
# Ranks whose connection broke are victims of another rank's fault.
VICTIMS_WAIT_S = 20.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_BROKEN_CONNECTION = (
    "Connection closed",
    "Connection reset",
    "Connection was likely closed",
    "gloo",
    "NCCL",
    "Broken pipe",
)


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
        else:
            run(lambda: action(composed, place), place)

    try:
        compose()
        sys.exit(max(statuses, default=0))  # of a multirun, the worst
    except SystemExit as end:
        # Hydra itself says what is wrong with an option, and exits with 1.
        sys.exit(REFUSED if end.code == 1 and not composed_well else end.code)


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
    except LayersweepError as error:
        if place.rank != 0:
            time.sleep(OTHERS_WAIT_S)
        who = f" (rank {place.rank})" if place.world > 1 else ""
        _say(f"layersweep: error{who}: {error}")
        status = AUDIT_FAILED if isinstance(error, AuditError) else REFUSED
    except KeyboardInterrupt:
        _say(
            "layersweep: interrupted; the same command goes on from the last finished layer "
            "(a rehearsal begins anew)"
        )
        status = INTERRUPTED
    except Exception as error:
        status = _report_fault(error, place)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _report_fault(error: Exception, place: Place) -> int:
    """Says what went wrong beyond a user's input; returns the exit status."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = error.filename or "the output"
        _say(f"layersweep: error: {where}: {error.strerror}; make room, then start it again")
        return REFUSED
    if place.world > 1 and any(word in str(error) for word in _BROKEN_CONNECTION):
        time.sleep(VICTIMS_WAIT_S)
        _say(
            f"layersweep: rank {place.rank} lost its connection: another rank ended "
            "(its own message says why). The same command goes on from the last finished layer"
        )
        return FAULT
    _say(f"layersweep: unexpected fault on rank {place.rank}")
    traceback.print_exc()
    return FAULT


def take_positional() -> str | None:
    """Takes the first word that is no option out of the command line."""
    for index, word in enumerate(sys.argv[1:], start=1):
        if word.startswith("-") or (index > 1 and sys.argv[index - 1].startswith("--config")):
            continue
        if "=" not in word or Path(word).is_dir():
            return sys.argv.pop(index)
    return None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
