"""Calibration text that a parser would not survive, and lines that are not JSON."""

import json
import os
import random
from pathlib import Path

import pytest

from pipeline.calibration import json_text
from pipeline.calibration.documents import DataSource, read_documents
from pipeline.calibration.json_text import MAX_DEPTH, find_broken_line, refuse_hostile_json
from pipeline.errors import DataError

OUT_OF_STACK = 200_000  # brackets, at which pyarrow ended the process


def write(tmp_path: Path, data: bytes, name: str = "text.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["text.jsonl", "text.json"])
@pytest.mark.parametrize(
    "line",
    [
        b'{"text": ' + b"[" * OUT_OF_STACK + b"]" * OUT_OF_STACK + b"}",
        b'{"a":' * OUT_OF_STACK,
        b"]" * OUT_OF_STACK + b"[" * OUT_OF_STACK,  # closing ones must not hide opening ones
        b'"never closed\n' + b"[" * OUT_OF_STACK,
        b'{"text": "\\\\"}' + b"[1," * OUT_OF_STACK,
    ],
)
def test_nesting_that_would_end_the_process(tmp_path: Path, line: bytes, name: str) -> None:
    path = write(tmp_path, b'{"text": "fine"}\n' + line + b"\n", name)
    with pytest.raises(DataError, match=rf"{name}, line .*brackets nested deeper than {MAX_DEPTH}"):
        next(read_documents(DataSource(path=str(path)), [0]))


def test_brackets_in_texts_count_nothing(tmp_path: Path) -> None:
    texts = ["[" * 5000, '"' + "{" * 5000, "\\" * 3 + "[" * 5000, "[\n" * 5000]
    path = write(tmp_path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    found = sorted(str(text) for text in read_documents(DataSource(path=str(path)), [0]))
    assert found == sorted(texts)


def test_the_depth_does_not_depend_on_where_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(3)

    def value(left: int) -> object:
        kind = draw.randrange(3) if left else 0
        if kind == 0:
            return "".join(draw.choice('ab"\\[]{}\n') for _ in range(draw.randrange(8)))
        items = [value(left - 1) for _ in range(draw.randrange(3))]
        return items if kind == 1 else {f'k{n}"\\': item for n, item in enumerate(items)}

    def depth(item: object) -> int:
        below = item.values() if isinstance(item, dict) else item
        return 0 if isinstance(item, str) else 1 + max(map(depth, below), default=0)  # type: ignore[call-overload]

    for _ in range(300):
        item = value(5)
        path = write(tmp_path, json.dumps(item).encode())
        monkeypatch.setattr(json_text, "_CHUNK_BYTES", draw.randrange(1, 9))
        monkeypatch.setattr(json_text, "MAX_DEPTH", depth(item))
        refuse_hostile_json(path)
        monkeypatch.setattr(json_text, "MAX_DEPTH", depth(item) - 1)
        if depth(item):
            with pytest.raises(DataError, match="nested deeper"):
                refuse_hostile_json(path)


def test_a_line_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 2 << 20)
    monkeypatch.setattr(json_text, "_CHUNK_BYTES", 1 << 20)
    row = json.dumps({"text": "x" * (2 << 20)}).encode()[:-20] + b'"}'
    refuse_hostile_json(write(tmp_path, row[: (2 << 20) - 10] + b'"}\n' + b"{}\n" * 9))
    with pytest.raises(DataError, match=r"line 2: found more than 2 MiB in a line"):
        refuse_hostile_json(write(tmp_path, b"{}\n" + row + b"x" * 100))
    refuse_hostile_json(write(tmp_path, b"[" + row + b"]" + b" " * (1 << 20), "one.json"))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', "Expecting"),
        (b'{"text": "\xff"}', "utf-8"),
        (b"[1]", "a JSON list"),
        (b'{"text": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_the_first_broken_line_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    path = write(tmp_path, b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"text.jsonl, line 3: found .*{why}"):
        find_broken_line(path)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.jsonl")
    with pytest.raises(DataError):
        next(read_documents(DataSource(path=str(tmp_path / "text.jsonl")), [0]))
    with pytest.raises(DataError, match="a FIFO, not a regular file"):
        refuse_hostile_json(tmp_path / "text.jsonl")
