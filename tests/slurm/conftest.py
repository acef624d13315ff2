"""The private Slurm that all tests here share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.private_slurm import PrivateSlurm, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateSlurm]:
    """Two idle nodes; gone at the end, and whenever this process ends."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="layersweep-slurm-"))  # short: a socket lies in it
    try:
        with PrivateSlurm(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
