"""`layersweep-plan`: what a job would do, without a GPU and without reading weights.

    python -m launch.plan model=nemotron3_ultra recipe=nvfp4_four_over_six parallel.world=8
    python -m launch.plan checkpoint=DIR recipe=NAME output=json

Exits with 2 if the job would be refused.
"""

from __future__ import annotations

from omegaconf import DictConfig

from launch.entry import CONF_DIR, launch
from pipeline.config import to_dataclass
from pipeline.planning import show_plan
from pipeline.preparation import Place
from pipeline.runtime.logs import set_up_logging


def main() -> None:
    """Console command."""
    launch("plan", _act)


def _act(composed: DictConfig, place: Place) -> int:
    set_up_logging(place.rank)
    return show_plan(to_dataclass(composed), CONF_DIR)


if __name__ == "__main__":
    main()
