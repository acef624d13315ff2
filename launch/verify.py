"""`layersweep-verify`: audits a quantized checkpoint directory, ours or another tool's.

    python -m launch.verify DIR [source=DIR] [output=json]

Exits with 0 if every rule holds, with 1 if one is broken.
"""

from __future__ import annotations

import dataclasses

from omegaconf import DictConfig

from launch.entry import launch, take_positional
from pipeline.config import to_dataclass
from pipeline.preparation import Place
from pipeline.runtime.logs import set_up_logging
from pipeline.verify import verify


def main() -> None:
    """Console command."""
    directory = take_positional()

    def act(composed: DictConfig, place: Place) -> int:
        set_up_logging(place.rank)
        config = to_dataclass(composed)
        if directory is not None:
            config = dataclasses.replace(config, directory=directory)
        return verify(config)

    launch("verify", act)


if __name__ == "__main__":
    main()
