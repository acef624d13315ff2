"""`layersweep-calibrate`: BF16 checkpoint in, checked NVFP4 checkpoint out.

python -m launch.calibrate checkpoint=DIR output=DIR recipe=NAME data=FILE
torchrun --nproc-per-node 8 -m launch.calibrate ... parallel.ep=8
"""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from launch.entry import CONF_DIR, launch
from pipeline.calibrate import calibrate, make_guard
from pipeline.config import REPORT_DIRECTORY, CalibrateConfig, to_dataclass, to_yaml
from pipeline.preparation import Place
from pipeline.publication import METRICS
from pipeline.report.records import RunReport
from pipeline.report.terminal import print_report
from pipeline.runtime.collectives import disconnect
from pipeline.runtime.endings import Status
from pipeline.runtime.logs import set_up_logging


def main() -> None:
    """Console command."""
    launch("calibrate", _act)


def _act(composed: DictConfig, place: Place) -> int:
    config = to_dataclass(composed)
    set_up_logging(place.rank, verbose=config.verbose)
    # NCCL's own watch would abort a rank, with a stack, as soon as the connection to a dead one
    # breaks: before anybody has said which one died.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    with make_guard(config, place, owns_process=True) as guard, guard.listening():
        try:
            report = calibrate(config, CONF_DIR, place, to_yaml(composed), guard)
        except BaseException:
            if guard.ending is None:
                raise  # before the ranks were connected: said as by every command
            status = guard.say()
            if place.world > 1:
                os._exit(status)  # no waiting for collectives that other ranks will never join
            return status
    disconnect()
    return 0 if report is None else _show(report, config)


def _show(report: RunReport, config: CalibrateConfig) -> int:
    """Shows the report on the terminal; returns the exit status."""
    directory = config.report_directory
    if report.is_rejected and not config.discards_output:
        directory = Path(report.output) / REPORT_DIRECTORY
    names = {"report": "report.html", "run": "run.json", "metrics": METRICS}
    print_report(report, files={key: directory / name for key, name in names.items()})
    return Status.audit_failed if report.is_rejected else Status.done


if __name__ == "__main__":
    main()
