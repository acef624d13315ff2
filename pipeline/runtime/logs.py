"""Logging: one stream, the rank in the prefix, other ranks than 0 speak only for errors.

Libraries are heard from ERROR upwards, unless the user asks for more (verbose=true).
"""

from __future__ import annotations

import logging
import sys


def set_up_logging(rank: int, *, verbose: bool = False) -> None:
    """Configures the root logger once, in main."""
    level = logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if verbose else logging.ERROR)
    for name in ("pipeline", "launch"):
        logging.getLogger(name).setLevel(level if rank == 0 else logging.ERROR)
    if not verbose:
        # Says at import that there is no CUDA, through a handler of its own.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        logging.captureWarnings(True)
