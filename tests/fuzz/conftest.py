"""A sandbox in memory, and the one watch over all fuzzed calls."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.watch import Watch


@pytest.fixture(scope="session")
def watch() -> Iterator[Watch]:
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="layersweep-fuzz-", dir=memory if memory.is_dir() else None)
    yield Watch(Path(folder).resolve())
    shutil.rmtree(folder)
