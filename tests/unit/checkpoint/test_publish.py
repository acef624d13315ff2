import json
import os
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import publish as publish_module
from pipeline.checkpoint.publish import WorkDirectory, check_output, finalize, prepare, publish
from pipeline.checkpoint.safetensors_file import read_header
from pipeline.checkpoint.writer import FileRecord, write_safetensors
from pipeline.errors import OutputError


def prepared(tmp_path: Path) -> tuple[WorkDirectory, list[FileRecord]]:
    work = check_output(tmp_path / "deep" / "out")
    prepare(work)
    files = [
        write_safetensors(work.files / f"layer-{n}.safetensors", {f"t{n}": torch.ones(n + 1)})
        for n in range(3)
    ]
    return work, files


def run(work: WorkDirectory, files: list[FileRecord], tmp_path: Path) -> list[FileRecord]:
    target = tmp_path / "blob"
    target.write_text("tok")
    link = tmp_path / "tokenizer.json"
    if not link.exists():
        link.symlink_to(target)
    return publish(
        work,
        files,
        config={"a": 1},
        hf_quant_config={"b": 2},
        small_files={"tokenizer.json": link, "code/x.py": target},
        extra={"report.html": b"<html>"},
    )


def test_published_by_one_rename(tmp_path: Path) -> None:
    work, files = prepared(tmp_path)
    named = run(work, files, tmp_path)
    assert not work.final.exists()
    final = finalize(work)
    assert sorted(p.relative_to(final).as_posix() for p in final.rglob("*") if p.is_file()) == [
        "code/x.py",
        "config.json",
        "hf_quant_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "report.html",
        "tokenizer.json",
    ]
    assert not (final / "tokenizer.json").is_symlink()
    assert not work.root.exists()
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (1 + 2 + 3)
    assert index["weight_map"]["t1"] == "model-00002-of-00003.safetensors"
    assert [record.name for record in named] == sorted(p.name for p in final.glob("*.safetensors"))
    assert "t2" in read_header(final / "model-00003-of-00003.safetensors")


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_killed_while_renaming_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    work, files = prepared(tmp_path)
    done = []

    def rename(old: Path, new: Path) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(old)
        real(old, new)

    real = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(publish_module.os, "rename", rename)
        # the first rename is that of the plan itself
        with pytest.raises(KeyboardInterrupt):
            run(work, files, tmp_path)
    again = check_output(tmp_path / "deep" / "out")
    prepare(again)
    names = sorted(path.name for path in again.files.iterdir())
    assert names == [f"layer-{n}.safetensors" for n in range(3)]
    run(again, files, tmp_path)
    assert len(list(finalize(again).glob("*.safetensors"))) == 3


def test_started_again_after_publish(tmp_path: Path) -> None:
    work, files = prepared(tmp_path)
    run(work, files, tmp_path)
    prepare(work)
    names = sorted(path.name for path in work.files.iterdir())
    assert names == [f"layer-{n}.safetensors" for n in range(3)]


def test_left_over_parts_are_not_published(tmp_path: Path) -> None:
    work, files = prepared(tmp_path)
    write_safetensors(work.files / "other-layout.safetensors", {"t0": torch.ones(1)})
    run(work, files, tmp_path)
    assert len(list(work.files.glob("*.safetensors"))) == 3


def test_tensor_written_twice_and_lost_file(tmp_path: Path) -> None:
    work, files = prepared(tmp_path)
    extra = write_safetensors(work.files / "again.safetensors", {"t0": torch.ones(1)})
    with pytest.raises(OutputError, match="t0: found in model-00001-of-00004"):
        run(work, [*files, extra], tmp_path)
    prepare(work)
    (work.files / "layer-1.safetensors").unlink()
    with pytest.raises(OutputError, match=r"layer-1.safetensors: found no such file"):
        run(work, files, tmp_path)


def test_final_name_taken_meanwhile(tmp_path: Path) -> None:
    work, files = prepared(tmp_path)
    run(work, files, tmp_path)
    work.final.mkdir()
    (work.final / "x").write_text("")
    with pytest.raises(OutputError, match="cannot be renamed"):
        finalize(work)
    (work.final / "x").unlink()
    assert finalize(work) == work.final


def test_check_output(tmp_path: Path) -> None:
    final = tmp_path / "out"
    assert check_output(final).final == final
    final.mkdir()
    check_output(final)
    (final / "x").write_text("")
    with pytest.raises(OutputError, match="a directory with files in it; must not exist"):
        check_output(final)
    with pytest.raises(OutputError, match="found a file"):
        check_output(final / "x")
    with pytest.raises(OutputError, match="is not writable"):
        check_output(final / "x" / "y")
    work = WorkDirectory.beside(tmp_path / "other")
    work.root.mkdir()
    check_output(work.final)
    (work.root / "x").write_text("")
    with pytest.raises(OutputError, match="no journal"):
        check_output(work.final)
    (work.root / "x").unlink()
    work.root.rmdir()
    work.root.write_text("")
    with pytest.raises(OutputError, match=r"work directory .* found a file"):
        check_output(work.final)


@pytest.mark.parametrize("relative", [".", "inside", ".."])
def test_output_and_source_overlap(tmp_path: Path, relative: str) -> None:
    source = tmp_path / "a" / "source"
    source.mkdir(parents=True)
    with pytest.raises(OutputError, match="must not lie in each other"):
        check_output(source / relative, source)
    check_output(tmp_path / "a" / "sourc", source)
