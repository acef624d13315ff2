"""Logging: one stream, the rank in the prefix, other ranks than 0 speak only for errors."""

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
    root.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    logging.getLogger("pipeline").setLevel(level if rank == 0 else logging.ERROR)
    logging.getLogger("launch").setLevel(level if rank == 0 else logging.ERROR)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
