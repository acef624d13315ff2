import json
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.writer import FileRecord, write_safetensors
from pipeline.errors import OutputError

FINGERPRINT = {"source": "abc", "recipe": {"name": "max", "kv": True}, "pattern": (1, 2)}


def new(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "work" / "journal", tmp_path / "work" / "files")
    journal.files.mkdir(parents=True)
    journal.start(FINGERPRINT)
    return journal


def write_file(journal: Journal, name: str) -> FileRecord:
    return write_safetensors(journal.files / name, {"x": torch.ones(8)})


def commit_layer(journal: Journal, layer: int, ranks: int = 2) -> list[str]:
    parts = [f"weights-rank{rank}" for rank in range(ranks)] + ["scalars"]
    for part in parts:
        record = write_file(journal, f"layer-{layer}-{part}.safetensors")
        journal.write_part(layer, part, [record], {"amax": 0.1 + layer, "part": part})
    journal.commit(layer, parts)
    return parts


def test_committed_only_after_the_marker(tmp_path: Path) -> None:
    journal = new(tmp_path)
    record = write_file(journal, "a.safetensors")
    assert journal.committed(3) is None
    journal.write_part(3, "rank0", [record], {"error": 0.1})
    assert journal.committed(3) is None
    journal.commit(3, ["rank0"])
    again = Journal(journal.directory, journal.files)
    assert again.start(FINGERPRINT) is True
    found = again.committed(3, checksums=True)
    assert found is not None
    assert found.files == (record,)
    assert found.parts[0].statistics == {"error": 0.1}


def test_parts_of_all_ranks_come_back_in_order(tmp_path: Path) -> None:
    journal = new(tmp_path)
    parts = commit_layer(journal, 12)
    commit_layer(journal, 1)
    found = journal.committed(12)
    assert found is not None
    assert [part.part for part in found.parts] == parts
    assert len(found.files) == 3
    assert journal.committed("embeddings") is None
    journal.write_part("embeddings", "rank0", [], {})
    journal.commit("embeddings", ["rank0"])
    assert journal.committed("embeddings") is not None


def test_commit_needs_every_part_and_file(tmp_path: Path) -> None:
    journal = new(tmp_path)
    journal.write_part(0, "rank0", [write_file(journal, "a.safetensors")], {})
    with pytest.raises(OutputError, match=r"layer-00000.part.rank1.json.*every part of a layer"):
        journal.commit(0, ["rank0", "rank1"])
    (journal.files / "a.safetensors").unlink()
    with pytest.raises(OutputError, match=r"layer 0: found .*a.safetensors has None bytes"):
        journal.commit(0, ["rank0"])
    assert journal.committed(0) is None


@pytest.mark.parametrize("target", ["commit", "part", "file", "gone"])
def test_torn_or_missing_means_not_committed(tmp_path: Path, target: str) -> None:
    journal = new(tmp_path)
    commit_layer(journal, 5)
    assert journal.committed(5) is not None
    path = {
        "commit": journal.directory / "layer-00005.commit.json",
        "part": journal.directory / "layer-00005.part.scalars.json",
        "file": journal.files / "layer-5-scalars.safetensors",
        "gone": journal.files / "layer-5-scalars.safetensors",
    }[target]
    if target == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    assert journal.committed(5) is None


def test_records_of_another_attempt_do_not_mix(tmp_path: Path) -> None:
    journal = new(tmp_path)
    commit_layer(journal, 5)
    journal.write_part(5, "scalars", [], {"amax": 9.0})  # a restart that was killed before commit
    assert journal.committed(5) is None
    commit_layer(journal, 5)
    assert journal.committed(5) is not None
    journal.discard(5)
    assert journal.committed(5) is None
    assert list(journal.directory.glob("layer-00005*")) == []


def test_checksums_on_request(tmp_path: Path) -> None:
    journal = new(tmp_path)
    commit_layer(journal, 0)
    path = journal.files / "layer-0-scalars.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert journal.committed(0) is not None
    assert journal.committed(0, checksums=True) is None


def test_another_fingerprint_shows_what_differs(tmp_path: Path) -> None:
    journal = new(tmp_path)
    other = {"source": "abc", "recipe": {"name": "mse", "kv": True}, "pattern": [1, 2], "seed": 1}
    with pytest.raises(OutputError) as caught:
        Journal(journal.directory, journal.files).start(other)
    text = str(caught.value)
    assert "recipe.name: was 'max', now 'mse'; seed: was 'absent', now 1" in text
    assert "source" not in text.split("found")[1].split(";")[0]


@pytest.mark.parametrize("content", [b'{"torn', b"[1]", None])
def test_unreadable_fingerprint(tmp_path: Path, content: bytes | None) -> None:
    journal = new(tmp_path)
    commit_layer(journal, 0)
    path = journal.directory / "fingerprint.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(OutputError, match=r"fingerprint.json: found unreadable .*remove the dir"):
        Journal(journal.directory, journal.files).start(FINGERPRINT)


def test_unrecorded_files(tmp_path: Path) -> None:
    journal = new(tmp_path)
    commit_layer(journal, 0)
    write_file(journal, "left-over.safetensors")
    assert [path.name for path in journal.unrecorded_files([0])] == ["left-over.safetensors"]


def test_statistics_keep_every_bit(tmp_path: Path) -> None:
    journal = new(tmp_path)
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
    journal.write_part(0, "rank0", [], {"values": values})
    journal.commit(0, ["rank0"])
    found = journal.committed(0)
    assert found is not None
    assert found.parts[0].statistics["values"] == values
    assert json.loads((journal.directory / "fingerprint.json").read_text())["source"] == "abc"
