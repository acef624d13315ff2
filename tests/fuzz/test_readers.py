"""Readers of other people's files, on more than ten thousand bad inputs.

Either what was read obeys the rules that later code relies on, or one of our errors says why not.
"""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.architecture import Architecture, expected_tensors, mtp_tensors
from pipeline.calibration.json_text import find_broken_line, refuse_hostile_json
from pipeline.calibration.token_file import load_token_file
from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.given_checksums import find_checksums
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo, name_fault, read_header
from pipeline.checkpoint.small_files import find_small_files
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.checkpoint.source_check import check_source
from pipeline.checkpoint.source_files import MAX_TENSORS, read_json, read_tensors
from pipeline.checkpoint.writer import write_safetensors
from pipeline.evaluation.quantized import QuantizedCheckpoint
from pipeline.hf_config import MAX_LAYERS, MAX_SIZE
from tests.fuzz.mutations import Chooser, broken_bytes, broken_json
from tests.fuzz.watch import Watch
from tests.unit.checkpoint.tiny import (
    export,
    mixed_formats,
    tiny_config,
    tiny_tensors,
    write_source,
)

INDEX = "model.safetensors.index.json"
TARGETS = {
    "headers": 3000,
    "raw safetensors": 1000,
    "indices": 1200,
    "configs": 2400,
    "token files": 1700,
    "quantized": 500,
    "calibration text": 1000,
    "small files": 500,
    "checksums": 500,
}
AT_LEAST = 10_000
MOST_GROWTH_GB = 1.0


@pytest.fixture(scope="module")
def source(watch: Watch) -> FileSource:
    config = tiny_config(hybrid_override_pattern="ME*-", num_hidden_layers=4)
    path = watch.sandbox / "source"
    return open_source(write_source(path, config, tiny_tensors(config), shards=2))


@pytest.fixture(scope="module")
def quantized(watch: Watch, source: FileSource) -> Path:
    formats = mixed_formats(Architecture.from_hf_config(source.config))
    made = export(source, watch.sandbox / "quantized", formats)
    assert audit(made).ok
    return made


# ---- safetensors

TENSORS = {
    "a.weight": ("BF16", [2, 3], 0, 12),
    "b": ("F32", [], 12, 16),
    "c.experts.0.weight": ("U8", [4, 1, 2], 16, 24),
    "empty": ("F8_E4M3", [0, 5], 24, 24),
}
HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        **{
            name: {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
            for name, (dtype, shape, start, stop) in TENSORS.items()
        },
    }
)
BUFFERS = bytes(range(24))
LIES = (0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 8, 2**40, 2**63)


def safetensors(text: bytes, lie: int = 0) -> bytes:
    return max(len(text) + lie, 0).to_bytes(8, "little") + text + BUFFERS


def check_header(path: Path, infos: dict[str, TensorInfo]) -> None:
    data = path.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")
    places = sorted((info.start, info.stop) for info in infos.values())
    stops = [first, *(stop for _, stop in places)]
    assert [start for start, _ in places] == stops[:-1]
    assert stops[-1] == len(data)
    for name, info in infos.items():
        assert name == info.name
        assert not name_fault(name)
        assert all(type(size) is int for size in info.shape)
        assert info.nbytes == info.elements * TORCH_DTYPES[info.dtype].itemsize
        assert b"".join(info.chunks()) == data[info.start : info.stop]


def test_headers(watch: Watch) -> None:
    def attempt(choose: Chooser) -> None:
        data = safetensors(broken_json(choose, HEADER), choose.pick(LIES))
        path = watch.put("x.safetensors", data)
        infos = watch.outcome(lambda: read_header(path))
        if infos is not None:
            check_header(path, infos)

    watch.fuzz("headers", attempt, inputs=TARGETS["headers"])


def test_raw_safetensors(watch: Watch) -> None:
    valid = safetensors(HEADER.encode())

    def attempt(choose: Chooser) -> None:
        path = watch.put("raw.safetensors", broken_bytes(choose, valid))
        infos = watch.outcome(lambda: read_header(path))
        if infos is not None:
            check_header(path, infos)

    watch.fuzz("raw safetensors", attempt, inputs=TARGETS["raw safetensors"])


SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.ones(2, 2), "b": torch.ones(3)},
    "model-00002-of-00002.safetensors": {"c": torch.ones(1)},
}


def test_indices(watch: Watch) -> None:
    directory = watch.sandbox / "indexed"
    directory.mkdir()
    for file, tensors in SHARDS.items():
        write_safetensors(directory / file, tensors)
    weight_map = {name: file for file, tensors in SHARDS.items() for name in tensors}
    valid = json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map})

    def attempt(choose: Chooser) -> None:
        watch.put(f"indexed/{INDEX}", broken_json(choose, valid))
        tensors = watch.outcome(lambda: read_tensors(directory))
        if tensors is not None:
            places = {name: info.path.name for name, info in tensors.items()}
            assert places.items() <= weight_map.items()
            assert all(info.path.parent == directory for info in tensors.values())

    watch.fuzz("indices", attempt, inputs=TARGETS["indices"])


# ---- config.json

CONFIG = tiny_config(
    hybrid_override_pattern="ME*-",
    num_hidden_layers=4,
    norm_eps=1e-5,
    time_step_limit=[0.0, {"__float__": "Infinity"}],
    layers_block_type=["mamba", "moe", "attention", "mlp"],
    sliding_window=None,
)


def open_config(path: Path, source: FileSource) -> Architecture:
    config = read_json(path, "is fuzzed")
    architecture = Architecture.from_hf_config(config)
    assert len(architecture.layers) <= MAX_LAYERS
    for field in dataclasses.fields(Architecture):
        value = getattr(architecture, field.name)
        if str(field.type).startswith("int") and value is not None:
            assert type(value) is int, field.name
            assert 0 <= value <= MAX_SIZE, field.name
    specs = [*expected_tensors(architecture), *mtp_tensors(architecture)]
    assert len(specs) < MAX_TENSORS + 100 * MAX_LAYERS
    check_source(dataclasses.replace(source, config=config), architecture)
    return architecture


def test_configs(watch: Watch, source: FileSource) -> None:
    valid = json.dumps(CONFIG)

    def attempt(choose: Chooser) -> None:
        path = watch.put("config.json", broken_json(choose, valid))
        found = watch.outcome(lambda: open_config(path, source))
        if found is not None:
            sizes = (found.hidden_size, found.vocab_size, len(found.layers))
            assert sizes == (64, 96, 4), "the tensors have these"

    watch.fuzz("configs", attempt, inputs=TARGETS["configs"])


# ---- token ids

DESCRIPTIONS = (
    *("<i8", "<i8", "<i8", ">u2", "|u1", "|O", "<f4", "<i8,<i8", "<M8[s]", "<m8", "|b1", "V9"),
    *("x", "", "<i999"),
)
ORDERS = ("True", "False", "False", "1", "None")
SHAPES = (
    *("(4, 6)", "(4, 6)", "(4, 6)", "(6, 4)", "(4,)", "()", "(10**9, 6)", "(4, True)", "(4.0, 6)"),
    *("(999999999999, 999999999999)", "(-4, -6)", "[4, 6]", "(0, 6)", "(4, 0)", "4", "(" * 110),
    *("(2, 2, 6)", "(24, 1)", "(True, 24)", "(18446744073709551616, 6)", "(4, 6", "'(4, 6)'"),
)
VERSIONS = (b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\1\1")


def token_file(choose: Chooser) -> bytes:
    text = (
        f"{{'descr': {choose.pick(DESCRIPTIONS)!r}, 'fortran_order': {choose.pick(ORDERS)}, "
        f"'shape': {choose.pick(SHAPES)}, }}"
    )
    version, body = choose.pick(VERSIONS), text.encode().ljust(118) + b"\n"
    width = 2 if version[0] == 1 else 4
    ids = np.arange(24, dtype=np.int64).tobytes()
    data = b"\x93NUMPY" + version + len(body).to_bytes(width, "little") + body + ids
    return broken_bytes(choose, data) if choose.once_in(3) else data


def test_token_files(watch: Watch) -> None:
    def attempt(choose: Chooser) -> None:
        path = watch.put("ids.npy", token_file(choose))
        ids = watch.outcome(lambda: load_token_file(path, 3, 4))
        if ids is not None:
            assert (ids.dtype, ids.shape) == (torch.int64, (3, 4))

    watch.fuzz("token files", attempt, inputs=TARGETS["token files"])


# ---- a quantized directory, as verify and evaluate read it


def test_quantized(watch: Watch, quantized: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    names = ("config.json", "config.json", "hf_quant_config.json", INDEX, shard)
    good = {name: (quantized / name).read_bytes() for name in names}
    config = json.loads(good["config.json"])
    inner = json.dumps(config["quantization_config"])
    outer = json.dumps({**config, "quantization_config": "?"}).encode()
    length = int.from_bytes(good[shard][:8], "little")
    header, buffers = good[shard][8 : 8 + length].decode(), good[shard][8 + length :]

    def attempt(choose: Chooser) -> None:
        name = choose.pick(names)
        if name == shard:
            text = broken_json(choose, header)
            data = len(text).to_bytes(8, "little") + text + buffers
        elif name == "config.json" and choose.once_in(2):
            data = outer.replace(b'"?"', broken_json(choose, inner))
        else:
            data = broken_json(choose, good[name].decode())
        watch.put(f"quantized/{name}", data)
        try:
            opened = watch.outcome(lambda: QuantizedCheckpoint(quantized))
            if opened is not None:
                assert audit(quantized).ok
        finally:
            watch.put(f"quantized/{name}", good[name])

    watch.fuzz("quantized", attempt, inputs=TARGETS["quantized"])


# ---- calibration text

ROWS = [
    json.dumps({"text": 'a "quoted" \\ [text'}),
    json.dumps({"messages": [{"role": "user", "content": "{hi"}]}),
]
DEEP = (b"", b"", b"", b"[" * 600, b'{"a":[' * 300 + b"]}" * 300, b'"[[[')


def text_file(choose: Chooser) -> bytes:
    rows = [broken_json(choose, choose.pick(ROWS)) for _ in range(choose.between(1, 2))]
    return choose.pick((b"\n", b"\n\n", b",", b"\r\n")).join([*rows, choose.pick(DEEP)])


def open_text(path: Path) -> bool:
    refuse_hostile_json(path)
    find_broken_line(path)
    return True


def test_calibration_text(watch: Watch) -> None:
    def attempt(choose: Chooser) -> None:
        data, suffix = text_file(choose), choose.pick(("jsonl", "json"))
        path = watch.put(f"text.{suffix}", data)
        if watch.outcome(lambda: open_text(path)) and suffix == "jsonl":
            lines = [line for line in data.split(b"\n") if line.strip()]
            assert all(isinstance(json.loads(line), dict) for line in lines)

    watch.fuzz("calibration text", attempt, inputs=TARGETS["calibration text"])


# ---- files beside the weights

NAMES = (
    *("tokenizer.json", "a b.txt", "modeling.py", "layersweep", "config.json", ".git", "x.bin"),
    *("é", "a\nb", "a\x01", "a\\b", "\udcff", "x" * 201, "x" * 255, "\u202e", "w.safetensors"),
)
KINDS = ("file", "file", "folder", "fifo", "nowhere", "itself", "..", "/", "/dev/zero")


def make_entry(path: Path, kind: str) -> None:
    if path.exists() or path.is_symlink():
        return
    if kind == "file":
        path.write_text("x")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "itself" else kind)


def test_small_files(watch: Watch) -> None:
    def attempt(choose: Chooser) -> None:
        directory = watch.sandbox / "copied" / "checkpoint"
        (directory / "inner").mkdir(parents=True)
        try:
            for _ in range(choose.between(1, 4)):
                parent = directory / "inner" if choose.once_in(2) else directory
                make_entry(parent / choose.pick(NAMES), choose.pick(KINDS))
            found = watch.outcome(lambda: find_small_files(directory))
            for relative, path in (found or {}).items():
                assert path.is_file()
                assert not any(map(name_fault, relative.split("/")))
                assert relative != "layersweep"
        finally:
            shutil.rmtree(directory.parent)

    watch.fuzz("small files", attempt, inputs=TARGETS["small files"])


def test_checksums(watch: Watch) -> None:
    directory = watch.sandbox / "summed"
    directory.mkdir()
    weights = directory / "model.safetensors"
    weights.write_bytes(b"x")
    lists = (
        ("SHA256SUMS", f"# made\n{'a' * 64}  model.safetensors\n{'b' * 64} *./other\n".encode()),
        ("model.safetensors.sha256", b"C" * 64 + b"\n"),
    )

    def attempt(choose: Chooser) -> None:
        name, valid = choose.pick(lists)
        path = watch.put(f"summed/{name}", broken_bytes(choose, valid))
        found = watch.outcome(lambda: find_checksums(directory, [weights]))
        path.unlink()
        for digest in (found or {}).values():
            assert len(bytes.fromhex(digest)) == 32
            assert digest == digest.lower()

    watch.fuzz("checksums", attempt, inputs=TARGETS["checksums"])


def test_enough_inputs_were_bad(watch: Watch) -> None:
    """After all of the above; not where only some of them were asked for."""
    if not set(TARGETS) <= set(watch.run):
        pytest.skip("only some targets were run")
    run: dict[str, Any] = {target: watch.run[target] for target in TARGETS}
    refused = {target: watch.refused[target] for target in TARGETS}
    assert sum(run.values()) >= AT_LEAST, run
    assert sum(refused.values()) >= AT_LEAST, refused
    for target, count in refused.items():
        assert count >= run[target] // 5, f"{target}: only {count} of {run[target]} were refused"
        assert count < run[target], f"{target}: nothing is accepted, so no rule was tried"
    grown_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 - watch.began_gb
    assert grown_gb < MOST_GROWTH_GB
