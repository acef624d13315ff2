"""What a whole run leaves on disk has the rights that the user's umask leaves, and no links."""

import os
from pathlib import Path

import pytest

from pipeline.checkpoint.durable import write_bytes
from tests.e2e.harness import run_job


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_a_published_checkpoint_has_the_umasks_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    # The drawings take long; the page is written as `write_html` writes it.
    monkeypatch.setattr(
        "pipeline.publication.write_html", lambda report, path: write_bytes(path, b"")
    )
    before = os.umask(umask)
    try:
        made = run_job(tmp_path / "out", world=2, ep=2)
    finally:
        os.umask(before)
    for path in [made, *made.rglob("*")]:
        assert not path.is_symlink()
        most = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == most & ~umask, path
    assert (made / "layersweep" / "run.json").is_file()
