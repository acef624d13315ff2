import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.architecture import Architecture, Role, TensorSpec, expected_tensors
from pipeline.checkpoint.source import Source, open_source
from pipeline.errors import SourceError
from pipeline.sharding import ParallelDims, Shard, shard_of
from tests.unit.checkpoint.tiny import load, tiny_config, tiny_tensors, write_source

INDEX = "model.safetensors.index.json"


def small(directory: Path, *, shards: int = 2, index: bool = True) -> Path:
    tensors = {name: torch.full((2, 4), i).bfloat16() for i, name in enumerate("abcd")}
    return write_source(directory, tiny_config(), tensors, shards=shards, index=index)


def test_single_file_shards_with_and_without_index_read_alike(tmp_path: Path) -> None:
    ways = {"one": (1, True), "index": (3, True), "no_index": (3, False)}
    for name, (shards, index) in ways.items():
        opened = open_source(small(tmp_path / name, shards=shards, index=index))
        assert sorted(opened.tensors) == ["a", "b", "c", "d"]
        assert opened.tensors["c"].dtype == "BF16"
        assert opened.read("c").tolist() == [[2.0] * 4] * 2
        assert opened.config["model_type"] == "nemotron_h"


def test_small_files_leave_out_weights_and_repositories(tmp_path: Path) -> None:
    directory = small(tmp_path / "s")
    for name in ("pytorch_model.bin", "old.pt", "model.gguf", "x.bin.index.json"):
        (directory / name).write_bytes(b"x")
    for folder in (".git", ".cache", "__pycache__"):
        (directory / folder).mkdir()
        (directory / folder / "file").write_bytes(b"x")
    assert sorted(open_source(directory).small_files) == ["nested/modeling.py", "tokenizer.json"]


def test_reads_through_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    real = small(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(path)
    opened = open_source(snapshot)
    assert opened.read("b").tolist() == [[1.0] * 4] * 2
    assert sorted(opened.small_files) == ["nested/modeling.py", "tokenizer.json"]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("degrees", [(2, 1, 1), (4, 2, 2), (2, 2, 1), (4, 1, 4)])
def test_every_shard_of_every_tensor(
    tmp_path: Path, degrees: tuple[int, int, int], kv_heads: int
) -> None:
    world, ep, etp = degrees
    config = tiny_config(num_key_value_heads=kv_heads, n_groups=2)
    tensors = tiny_tensors(config)
    opened = open_source(write_source(tmp_path, config, tensors))
    architecture = Architecture.from_hf_config(config)
    dims = ParallelDims(world=world, tp=2, ep=ep, etp=etp)
    cut = 0
    for spec in expected_tensors(architecture):
        whole = tensors[spec.name]
        for rank in range(world):
            shard = shard_of(spec, architecture, dims, rank)
            if shard is None:
                continue
            wanted = whole
            if not shard.is_whole:
                cut += 1
                pieces = [whole.narrow(shard.dim, a, b - a) for a, b in shard.ranges]
                wanted = torch.cat(pieces, dim=shard.dim)
            local = opened.read(spec.name, shard)
            assert local.dtype == whole.dtype
            assert torch.equal(local, wanted), spec.name
    assert cut > 50


def test_cuts_of_later_dims_by_pieces_and_by_rows(tmp_path: Path) -> None:
    wide = torch.arange(5 * 6000, dtype=torch.float32).reshape(5, 6000)
    cube = torch.arange(4 * 6 * 3, dtype=torch.int16).reshape(4, 6, 3)
    opened = open_source(write_source(tmp_path, {}, {"wide": wide, "cube": cube}))
    big = Shard(1, ((0, 2000), (4000, 6000)), (5, 4000))  # 8000-byte pieces: one read each
    assert torch.equal(opened.read("wide", big), torch.cat([wide[:, :2000], wide[:, 4000:]], dim=1))
    little = Shard(1, ((4, 6), (0, 1)), (4, 3, 3))  # rows are read whole
    assert torch.equal(opened.read("cube", little), torch.cat([cube[:, 4:], cube[:, :1]], dim=1))


def test_threads_may_read_at_the_same_time(source: Source) -> None:
    names = list(source.tensors) * 4
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, names))
    for name, tensor in zip(names, read, strict=True):
        assert torch.equal(tensor, source.read(name))


def test_misfitting_shard_and_unknown_tensor(tmp_path: Path) -> None:
    opened = open_source(small(tmp_path))
    with pytest.raises(SourceError, match=r"a: found shape \[2, 4\]; a shard \[3, 4\] of dim 0"):
        opened.read("a", Shard(0, ((0, 3),), (3, 4)))
    with pytest.raises(SourceError, match="must fit into it"):
        opened.read("a", Shard(-1, (), (4, 2)))
    with pytest.raises(SourceError, match="zz: found no such tensor"):
        opened.read("zz")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    opened = open_source(small(tmp_path, shards=1))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceError, match=r"model.safetensors: d: found end of file"):
        opened.read("d")


def test_missing_shard(tmp_path: Path) -> None:
    directory = small(tmp_path)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match="1 files that do not exist: model-00002-of-00002"):
        open_source(directory)


def test_index_and_headers_disagree(tmp_path: Path) -> None:
    directory = small(tmp_path)
    index = json.loads((directory / INDEX).read_text())
    moved = json.loads(json.dumps(index))
    moved["weight_map"]["a"] = "model-00002-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(moved))
    with pytest.raises(SourceError, match="tensors that their files lack: a in model-00002"):
        open_source(directory)
    absent = json.loads(json.dumps(index))
    absent["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(absent))
    with pytest.raises(SourceError, match="1 tensors that their files lack: ghost in"):
        open_source(directory)
    del index["weight_map"]["d"]
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(SourceError, match="1 tensors that the index lacks: d"):
        open_source(directory)
    (directory / INDEX).write_text('{"weight_map": {"a": "../elsewhere"}}')
    with pytest.raises(SourceError, match="no usable weight_map"):
        open_source(directory)


def test_tensor_in_two_files(tmp_path: Path) -> None:
    directory = small(tmp_path, index=False)
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "extra.safetensors")
    with pytest.raises(SourceError, match=r"a: found in .*extra.safetensors and in"):
        open_source(directory)


def test_no_weights_no_config_wrong_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config.json: found No such file"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config.json: found invalid JSON"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match="must be a JSON object"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"no \.safetensors file"):
        open_source(tmp_path)


def test_neither_directory_nor_hub_id(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory; must be a directory, a Hub id"):
        open_source(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="found a file"):
        open_source(tmp_path / "file")


def test_hub_id_offline_and_absent() -> None:
    with pytest.raises(SourceError, match=r"not in the Hub cache.*offline.*hf download no/such"):
        open_source("no/such")


def test_hub_cache_first_then_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = small(tmp_path / "whole"), []
    partial = tmp_path / "partial"
    partial.mkdir()
    shutil.copy(whole / "config.json", partial)
    cached = {"org/whole": whole, "org/partial": partial}

    def fake(hub_id: str, *, local_files_only: bool = False, **_: object) -> str:
        calls.append((hub_id, local_files_only))
        if local_files_only and hub_id not in cached:
            raise LocalEntryNotFoundError("absent")
        return str(cached[hub_id] if local_files_only else whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    for hub_id in ("org/whole", "org/partial", "org/new"):
        assert open_source(hub_id).directory == whole
    assert calls == [
        ("org/whole", True),
        ("org/partial", True),
        ("org/partial", False),
        ("org/new", True),
        ("org/new", False),
    ]


def test_raw_bytes_of_all_tensors(source: Source) -> None:
    stored = {}
    for path in source.directory.glob("*.safetensors"):
        stored |= load(path)
    wanted = tiny_tensors(tiny_config())
    for name, tensor in stored.items():
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(tensor, wanted[name])


def test_scalar_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    opened = open_source(write_source(tmp_path, {}, tensors))
    assert opened.read("scalar").item() == 2.5
    assert opened.read("empty").shape == (0, 4)
    spec = TensorSpec("scalar", (), Role.norm)
    assert opened.read(spec.name, Shard(-1, (), ())).shape == ()
