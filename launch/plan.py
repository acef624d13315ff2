"""`layersweep-plan`: what a job would do, without a GPU and without reading weights.

    python -m launch.plan model=nemotron3_ultra recipe=nvfp4_four_over_six parallel.world=8
    python -m launch.plan checkpoint=DIR recipe=NAME output=json

Exits with 2 if the job would be refused.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from launch.entry import CONF_DIR, JOBS_DIR, place_of_process, run
from pipeline.config import register_schemas, to_dataclass
from pipeline.planning import show_plan
from pipeline.runtime.logs import set_up_logging


def main() -> None:
    """Console command."""
    register_schemas()
    _compose()


@hydra.main(version_base=None, config_path=str(JOBS_DIR), config_name="plan")
def _compose(composed: DictConfig) -> None:
    set_up_logging(0)
    run(lambda: show_plan(to_dataclass(composed), CONF_DIR), place_of_process())


if __name__ == "__main__":
    main()
