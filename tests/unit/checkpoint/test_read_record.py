"""Digests of what was read: the same whoever reads, another one for another bit."""

import os
from pathlib import Path

import pytest
import torch

from pipeline.architecture import Role, TensorSpec
from pipeline.checkpoint.passthrough import take_copy
from pipeline.checkpoint.read_ahead import ReadAhead
from pipeline.checkpoint.read_record import ReadRecord, digest_whole
from pipeline.checkpoint.safetensors_file import CHUNK_BYTES, as_bytes
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.errors import SourceError
from pipeline.sharding import Shard
from tests.unit.checkpoint.tiny import write_source

NAME = "backbone.layers.3.mixer.up_proj.weight"
HEAD = "lm_head.weight"
ROWS, COLUMNS = 4100, 5000  # 41 MB: pieces of 16 MiB, the last one shorter
WHOLE = Shard(-1, (), (ROWS, COLUMNS))
SHARDS = {
    "rows": Shard(0, ((100, 2100),), (2000, COLUMNS)),
    "two stretches": Shard(0, ((0, 10), (4000, 4100)), (110, COLUMNS)),
    "columns": Shard(1, ((0, 1000), (4000, 4500)), (ROWS, 1500)),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {
        NAME: torch.arange(ROWS * COLUMNS, dtype=torch.int32).to(torch.int16).view(ROWS, COLUMNS),
        HEAD: torch.ones(3, 5).bfloat16(),
        "empty": torch.ones(0, 5),
    }
    return write_source(tmp_path_factory.mktemp("source"), {}, tensors)


@pytest.fixture
def source(directory: Path) -> FileSource:
    return open_source(directory).recorded()


def reads_of(source: FileSource) -> ReadRecord:
    assert source.reads is not None
    return source.reads


def read_ahead(source: FileSource, shard: Shard, threads: int = 4) -> None:
    spec = TensorSpec(NAME, (ROWS, COLUMNS), Role.mlp, 3)
    options = {"threads": threads, "buffer_bytes": 1, "pinned": False}
    with ReadAhead([[(spec, NAME, shard)]], source, **options) as ahead:
        for item in ahead.layer():
            item.release()


@pytest.mark.parametrize("name", SHARDS)
def test_every_reader_has_the_same_digest_of_a_shard(source: FileSource, name: str) -> None:
    read_ahead(source, SHARDS[name])
    ((key, digest),) = reads_of(source).of_layer(3).items()
    assert key.startswith(f"{NAME} dim {SHARDS[name].dim} ")
    source.read(NAME, SHARDS[name])  # refused if it were another one
    read_ahead(source, SHARDS[name], threads=1)
    assert reads_of(source).of_layer(3) == {key: digest}


def test_a_whole_tensor_may_also_be_copied(source: FileSource) -> None:
    tensor = source.read(NAME)
    assert tensor.nbytes > 2 * CHUNK_BYTES
    assert reads_of(source).of_layer(3) == {NAME: digest_whole(as_bytes(tensor))}
    read_ahead(source, WHOLE)
    for name in (NAME, HEAD, "empty"):
        for _ in take_copy(source, name, 0).chunks():
            pass
    assert set(reads_of(source).of_outside()) == {HEAD, "empty"}
    assert reads_of(source).of_layer(4) == {}


def test_other_bytes_are_refused_by_whoever_reads_them(directory: Path, tmp_path: Path) -> None:
    first = open_source(directory).recorded()
    read_ahead(first, SHARDS["columns"])
    first.read(NAME)
    recorded = reads_of(first).of_layer(3)

    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("model.safetensors", "config.json"):
        (copy / name).write_bytes((directory / name).read_bytes())
    changed = open_source(copy).recorded()
    reads_of(changed).expect(recorded)
    changed.read(NAME)
    info = changed.info(NAME)
    with info.path.open("r+b") as file:
        file.seek(info.start + 2 * 4200)  # of row 0, in the columns' second range
        byte = file.read(1)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), info.start + 2 * 4200)

    message = f"{info.path}: {NAME}.*other bytes: changed since it was packed by an earlier attempt"
    with pytest.raises(SourceError, match=message):
        changed.read(NAME)
    with pytest.raises(SourceError, match=r"dim 1 0:1000,4000:4500: found other bytes"):
        read_ahead(changed, SHARDS["columns"])
    with pytest.raises(SourceError, match="changed since it was packed"):
        list(take_copy(changed, NAME, 0).chunks())
    changed.read(NAME, SHARDS["rows"])  # row 0 is not among them
    changed.close()

    again = open_source(copy).recorded()
    again.read(NAME)
    with pytest.raises(SourceError, match=rf"{info.path}: {NAME}: found other bytes"):
        reads_of(again).expect(recorded)


def test_a_change_while_the_run_goes_on_is_noticed(directory: Path, source: FileSource) -> None:
    info = source.info(HEAD)
    source.read(HEAD)
    original = info.path.read_bytes()
    try:
        with info.path.open("r+b") as file:
            file.seek(info.start)
            file.write(b"\0")
        with pytest.raises(SourceError, match="changed since this attempt read it first"):
            source.read(HEAD)
    finally:
        info.path.write_bytes(original)


def test_nothing_is_digested_where_nobody_asks(directory: Path) -> None:
    plain = open_source(directory)
    read_ahead(plain, SHARDS["rows"])
    assert plain.reads is None
