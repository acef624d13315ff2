"""`layersweep-verify`: audits a quantized checkpoint directory, ours or another tool's.

    python -m launch.verify DIR [source=DIR] [output=json]

Exits with 0 if every rule holds, with 1 if one is broken.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from launch.entry import JOBS_DIR, place_of_process, positional_to_override, run
from pipeline.config import register_schemas, to_dataclass
from pipeline.runtime.logs import set_up_logging
from pipeline.verify import verify


def main() -> None:
    """Console command."""
    register_schemas()
    positional_to_override("directory")
    _compose()


@hydra.main(version_base=None, config_path=str(JOBS_DIR), config_name="verify")
def _compose(composed: DictConfig) -> None:
    set_up_logging(0)
    run(lambda: verify(to_dataclass(composed)), place_of_process())


if __name__ == "__main__":
    main()
