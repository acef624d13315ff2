"""`layersweep-evaluate`: what a quantized checkpoint lost, measured against its BF16 source.

    python -m launch.evaluate DIR source=DIR data=FILE [evaluation.max_kl=0.05]
    torchrun --nproc-per-node 8 -m launch.evaluate DIR source=DIR data=FILE

DIR is ours or Model Optimizer's. Exits with 0 if all gates are passed and every weight stands for
its source's, else with 1.
"""

from __future__ import annotations

import dataclasses

from omegaconf import DictConfig

from launch.entry import CONF_DIR, launch, take_positional
from pipeline.config import to_dataclass
from pipeline.evaluate import evaluate
from pipeline.preparation import Place
from pipeline.runtime.collectives import disconnect
from pipeline.runtime.logs import set_up_logging


def main() -> None:
    """Console command."""
    directory = take_positional()

    def act(composed: DictConfig, place: Place) -> int:
        config = to_dataclass(composed)
        set_up_logging(place.rank, verbose=config.verbose)
        if directory is not None:
            config = dataclasses.replace(config, directory=directory)
        status = evaluate(config, CONF_DIR, place)
        disconnect()
        return status

    launch("evaluate", act)


if __name__ == "__main__":
    main()
