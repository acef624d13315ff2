"""`layersweep-compare`: several recipes on one checkpoint, or several finished runs, side by side.

python -m launch.compare checkpoint=DIR data=FILE recipes='[nvfp4_max,nvfp4_four_over_six]'
torchrun --nproc-per-node 8 -m launch.compare checkpoint=DIR ...
python -m launch.compare runs='[OUTPUT_1,OUTPUT_2]'
"""

from __future__ import annotations

from omegaconf import DictConfig

from launch.entry import CONF_DIR, launch
from pipeline.comparison import compare_recipes
from pipeline.config import PlanOutput, to_dataclass
from pipeline.config_compare import CompareConfig
from pipeline.preparation import Place
from pipeline.report.comparison import (
    notes_of,
    print_rows,
    read_rows,
    row_of,
    to_values,
    write_rows,
)
from pipeline.report.plan_table import print_json
from pipeline.runtime.collectives import disconnect
from pipeline.runtime.logs import set_up_logging


def main() -> None:
    """Console command."""
    launch("compare", _act)


def _act(composed: DictConfig, place: Place) -> int:
    config: CompareConfig = to_dataclass(composed)
    set_up_logging(place.rank, verbose=config.verbose)
    notes: list[str] = []
    if config.runs:
        rows = read_rows(config.runs)
        notes += [
            "from the reports of finished runs; time is that of the whole run",
            *notes_of(rows),
        ]
    else:
        reports = compare_recipes(config, CONF_DIR, place)
        disconnect()
        if reports is None:
            return 0
        rows = [row_of(report) for report in reports]
        notes += dict.fromkeys(w for report in reports for w in report.warnings)
        evaluation = reports[0].evaluation
        if evaluation is not None:
            notes.insert(
                0,
                f"evaluated on {evaluation.sequences} x {evaluation.seq_len} tokens: "
                f"{evaluation.data}; {evaluation.arithmetic}; {reports[0].hardware}",
            )
    write_rows(rows, config.report_directory, notes)
    if config.table is PlanOutput.json:
        print_json(to_values(rows, notes))
    else:
        print_rows(rows, notes, files=config.report_directory)
    return 0


if __name__ == "__main__":
    main()
