"""Weights, indices and JSON that somebody else made: what is refused, how soon, in what memory."""

import json
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.hub import is_complete, locate
from pipeline.checkpoint.regular_files import OpenFiles, read_regular
from pipeline.checkpoint.safetensors_file import MAX_HEADER_BYTES, read_header
from pipeline.checkpoint.source import open_source
from pipeline.checkpoint.source_files import INDEX_NAME, read_json, read_tensors
from pipeline.checkpoint.strict_json import MAX_DEPTH, MAX_ITEMS, parse_json
from pipeline.errors import LayersweepError, SourceError
from tests.distributed.helpers import run_ranks
from tests.unit.checkpoint.tiny import tiny_config, write_source

SOON_S = 2.0


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def refusal(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_header(path)
    return str(caught.value)


# ---- what is no file


def make_special(path: Path, kind: str) -> None:
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a character device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a character device", "a socket"])
@pytest.mark.parametrize("name", ["model.safetensors", INDEX_NAME, "config.json", "tokenizer.json"])
def test_special_files_are_refused_and_never_waited_for(
    tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_source(tmp_path / "s", {}, {"a": torch.ones(1)})
    (directory / name).unlink(missing_ok=True)
    monkeypatch.chdir(directory)  # names of sockets are short
    make_special(Path(name), kind)
    start = time.monotonic()
    if name == "tokenizer.json" and kind == "a directory":
        assert open_source(directory).small_files
        return
    with pytest.raises(SourceError) as caught:
        open_source(directory)
    assert name in str(caught.value)
    assert kind in str(caught.value) or "no readable regular file" in str(caught.value)
    assert time.monotonic() - start < SOON_S


def test_a_file_that_becomes_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    os.mkfifo(path)
    with pytest.raises(OSError, match="a FIFO, not a regular file"):
        OpenFiles().descriptor(path)


def test_files_of_proc_are_bounded_although_they_say_that_they_are_empty() -> None:
    with pytest.raises(OSError, match="more than 10"):
        read_regular(Path("/proc/self/maps"), 10)


# ---- headers


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("", "an empty name"),
        ("a\nb", r"the name 'a\nb' with a character that cannot be printed"),
        ("a\0", "cannot be printed"),
        ("\x1b[2J", "cannot be printed"),
        ("\u202e", "cannot be printed"),
        ("a\\b", "with a backslash"),
        ("x" * 513, "a name of 513 characters, more than 512"),
    ],
)
def test_names_that_a_line_cannot_hold(tmp_path: Path, name: str, found: str) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    assert found in refusal(header(**{name: entry}), tmp_path)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([True], [0, 1]),
        ([1], [False, True]),
        ([1.0], [0, 1]),
        ([-1, -1], [0, 1]),
        ("1", [0, 1]),
        ({"1": 1}, [0, 1]),
        ([1], [0, 1, 1]),
        ([1], [1, 0]),
        ([1] * 9, [0, 1]),
        ([1] * 5000, [0, 1]),
        ([2**63], [0, 1]),
        ([10**25], [0, 1]),
        (None, [0, 1]),
    ],
)
def test_shapes_and_offsets_that_are_no_sizes(tmp_path: Path, shape: Any, offsets: Any) -> None:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
    assert "a header that does not parse" in refusal(header(a=entry) + b"x", tmp_path)


def test_a_product_that_would_overflow_is_compared_exactly(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [2**62] * 8, "data_offsets": [0, 0]}
    assert f"takes {2**496}" in refusal(header(a=entry), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b'{"__metadata__":[1]}',
        b'{"__metadata__":{"a":1}}',
        b'{"a":[]}',
        b'{"a":{"dtype":{},"shape":[],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,0]}}',
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        b'{"\xff":1}',
        b"[" * 100_000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_headers_that_are_no_headers(tmp_path: Path, text: bytes) -> None:
    message = refusal(len(text).to_bytes(8, "little") + text, tmp_path)
    assert "a header that does not parse" in message
    assert len(message) < 1000


def test_a_gigantic_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(1 << 40)
    start = time.monotonic()
    with pytest.raises(SourceError, match="a header of 100,000,001 bytes; a header has at most"):
        read_header(path)
    assert time.monotonic() - start < SOON_S


# The largest that are parsed at all, by what makes Python hold most.
LARGEST: dict[str, Callable[[], bytes]] = {
    "spaces": lambda: b"{" + b" " * (MAX_HEADER_BYTES - 2) + b"}",
    "one text": lambda: '{"é": "'.encode() + b"x" * (MAX_HEADER_BYTES - 20) + b'"}',
    "empty lists": lambda: b'{"a":[' + b"[]," * (MAX_ITEMS // 2 - 4) + b"1]}",
    "small objects": lambda: b'{"a":[' + b'{"a":1},' * (MAX_ITEMS // 2 - 4) + b"1]}",
    "too many lists": lambda: b'{"a":[' + b"[]," * (MAX_HEADER_BYTES // 3 - 10) + b"1]}",
    "brackets": lambda: b"[" * MAX_HEADER_BYTES,
    "digits": lambda: b'{"a":' + b"9" * (MAX_HEADER_BYTES - 10) + b"}",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_headers_take_bounded_time_and_memory(tmp_path: Path, kind: str) -> None:
    text = LARGEST[kind]()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    del text

    def read(_rank: int) -> tuple[str, float]:
        begun, used = time.process_time(), int(Path("/proc/self/statm").read_text().split()[0])
        limit = used * resource.getpagesize() + (2 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            read_header(path)
        except SourceError as error:
            return str(error)[:200], time.process_time() - begun
        return "read", time.process_time() - begun

    ((said, seconds),) = run_ranks(read, 1)
    assert "x.safetensors" in said or (kind == "spaces" and said == "read")
    assert seconds < 20


def test_all_values_of_a_json_text_are_looked_at() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    for text in (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), b'["\\ud800"]', b'{"\\udfff":1}'):
        with pytest.raises(ValueError, match=r"nested deeper|half of a surrogate pair"):
            parse_json(text)
    assert parse_json(b'["\\ud834\\udd1e", 1.5e300, -7]') == ["𝄞", 1.5e300, -7]


# ---- index


@pytest.mark.parametrize(
    "file",
    [
        *(
            "../s/model-00001-of-00002.safetensors",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a\\b.safetensors",
        ),
        *("a\n.safetensors", "x" * 201 + ".safetensors", "model.bin", 7, None, True, ["a"], "\0"),
    ],
)
def test_an_index_names_weight_files_of_its_own_directory(tmp_path: Path, file: Any) -> None:
    tensors = {name: torch.ones(2) for name in "ab"}
    directory = write_source(tmp_path / "s", {}, tensors, shards=2)
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"]["a"] = file
    (directory / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"index\.json: found no usable weight_map"):
        read_tensors(directory)
    assert is_complete(directory), "opening it says more"


def test_an_index_with_a_name_twice(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "s", {}, {n: torch.ones(2) for n in "ab"}, shards=2)
    text = (directory / INDEX_NAME).read_text()
    (directory / INDEX_NAME).write_text(text.replace('{"a"', '{"a": "other", "a"'))
    with pytest.raises(SourceError, match="'a' appears twice"):
        read_tensors(directory)


def test_weight_files_with_names_that_cannot_be_printed(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "s", {}, {"a": torch.ones(2)})
    (directory / "model.safetensors").rename(directory / "a\nb.safetensors")
    with pytest.raises(SourceError, match=r"1 weight files with such names: 'a\\nb\.safetensors'"):
        read_tensors(directory)


# ---- config.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, "hidden_size: found 1000000000; must be a positive int, at most"),
        ({"hidden_size": 0}, "hidden_size: found 0; must be a positive int"),
        ({"hidden_size": -64}, "hidden_size: found -64"),
        ({"hidden_size": True}, "hidden_size: found True"),
        ({"hidden_size": "64"}, "hidden_size: found '64'"),
        ({"hidden_size": 64.0}, "hidden_size: found 64.0"),
        ({"n_routed_experts": 10**6}, "n_routed_experts: found 1,000,000 in each of 5 layers"),
        ({"n_routed_experts": 10**9}, "n_routed_experts: found 1000000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000"),
        ({"num_hidden_layers": 12.0}, "num_hidden_layers: found 12.0"),
        ({"hybrid_override_pattern": "M" * 50_000_000}, "found 50,000,000 layers"),
        ({"hybrid_override_pattern": {"M": 1}}, "found {'M': 1}"),
        ({"hybrid_override_pattern": ["x" * 10**6]}, "layer types are"),
        ({"mtp_hybrid_override_pattern": "E" * 10**6}, "found 1,000,000 layers"),
        ({"model_type": "x" * 10**6}, "model_type 'nemotron_h'"),
        ({"time_step_limit": [False, {"__float__": "Infinity"}]}, "time_step_limit"),
        ({"time_step_limit": [0, ["x" * 10**6]]}, "time_step_limit"),
    ],
)
def test_absurd_configs_are_refused_soon_and_shortly(changes: dict[str, Any], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(LayersweepError) as caught:
        Architecture.from_hf_config(tiny_config(**changes))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - start < SOON_S


def test_infinity_of_nvidias_config_is_read_and_other_overflow_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(path, "is there")["time_step_limit"] == [0.0, float("inf")]
    path.write_text('{"norm_eps": 1e999}')
    with pytest.raises(SourceError, match="a number that overflows: '1e999'"):
        read_json(path, "is there")


def test_an_audit_takes_hostile_directories(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "model.safetensors").mkdir()
    problems = "\n".join(audit(tmp_path).problems)
    assert "config.json: a FIFO, not a regular file" in problems
    assert "a directory, not a regular file" in problems


def test_hub_ids_that_are_none() -> None:
    for name in ("a/..", "a--b/c..d"):
        with pytest.raises(SourceError, match=f"checkpoint {name}"):
            locate(name)
