"""`layersweep-calibrate`: BF16 checkpoint in, checked NVFP4 checkpoint out.

python -m launch.calibrate checkpoint=DIR output=DIR recipe=NAME data=FILE
torchrun --nproc-per-node 8 -m launch.calibrate ... parallel.ep=8
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from launch.entry import CONF_DIR, GATE_MISSED, launch
from pipeline.calibrate import calibrate
from pipeline.config import REPORT_DIRECTORY, to_dataclass, to_yaml
from pipeline.preparation import Place
from pipeline.publication import METRICS
from pipeline.report.terminal import print_report
from pipeline.runtime.collectives import disconnect
from pipeline.runtime.logs import set_up_logging


def main() -> None:
    """Console command."""
    launch("calibrate", _act)


def _act(composed: DictConfig, place: Place) -> int:
    config = to_dataclass(composed)
    set_up_logging(place.rank, verbose=config.verbose)
    report = calibrate(config, CONF_DIR, place, to_yaml(composed))
    disconnect()
    if report is not None:
        directory = config.report_directory
        if report.is_rejected and not config.discards_output:
            directory = Path(report.output) / REPORT_DIRECTORY
        names = {"report": "report.html", "run": "run.json", "metrics": METRICS}
        print_report(report, files={key: directory / name for key, name in names.items()})
        if report.is_rejected:
            return GATE_MISSED
    return 0


if __name__ == "__main__":
    main()
