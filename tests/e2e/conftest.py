"""What the end-to-end tests share."""

from pathlib import Path

import pytest

from tests.e2e.models import write_checkpoint


@pytest.fixture(autouse=True)
def _without_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plots take longer than these jobs, and have tests of their own."""
    monkeypatch.setattr("pipeline.publication.write_html", lambda report, path: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small random checkpoint with all kinds of layers."""
    return write_checkpoint(tmp_path / "source")
