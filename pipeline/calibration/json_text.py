"""Calibration text in JSON, looked at before a library parses it, and after one refused it.

In: a .jsonl or .json file. Out: nothing, or a `DataError` that names the line. pyarrow, which
reads these files for `datasets`, recurses for every bracket, and ends the process where there are
some ten thousands of them; it takes a line whole, however long it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.regular_files import open_regular
from pipeline.errors import DataError

MAX_DEPTH = 512
"""Of brackets; a chat message with tools has some ten."""
MAX_LINE_BYTES = 256 << 20
"""Of a .jsonl file: one document."""

_CHUNK_BYTES = 4 << 20
_QUOTE, _BACKSLASH, _NEWLINE = b'"\\\n'
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_SIGNS = bytes(value in b'"\\\n[]{}' for value in range(256))


class _State(NamedTuple):
    """What one chunk leaves to the next."""

    depth: int = 0
    in_string: bool = False
    is_escaped: bool = False


def refuse_hostile_json(file: Path) -> None:
    """Refuses nesting and lines that a parser would not survive; about 200 MB/s.

    Raises:
        DataError: One of the two; names the line.
    """
    state, line, line_bytes = _State(), 1, 0
    has_lines = file.suffix.lower() == ".jsonl"
    try:
        opened = os.fdopen(open_regular(file), "rb")
    except OSError as problem:
        raise refused(file, 1, problem.strerror or str(problem)) from problem
    with opened:
        while data := opened.read(_CHUNK_BYTES):
            state, deepest, newlines = _scan(data, state)
            if deepest > MAX_DEPTH:
                near = f"{line} to {line + len(newlines)}" if len(newlines) else str(line)
                raise refused(file, near, f"brackets nested deeper than {MAX_DEPTH}")
            ends = np.concatenate([[-1 - line_bytes], newlines])
            line_bytes = len(data) - 1 - int(ends[-1])
            longest = max(line_bytes, int(np.diff(ends).max(initial=0)))
            line += len(newlines)
            if has_lines and longest > MAX_LINE_BYTES:
                raise refused(file, line, f"more than {MAX_LINE_BYTES >> 20} MiB in a line")


def find_broken_line(file: Path) -> None:
    """Names the first line of a .jsonl file, or the place in a .json file, that is not JSON.

    Raises:
        DataError: There is one.
    """
    if file.suffix.lower() == ".json":
        try:
            json.loads(file.read_bytes())
            return
        except json.JSONDecodeError as error:
            if "Extra data" not in error.msg:
                raise refused(file, error.lineno, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise refused(file, 1, str(error)) from None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # JSON, UTF-8, endless digits or brackets
                why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise refused(file, number, why) from None
            if not isinstance(row, dict):
                raise refused(file, number, f"a JSON {type(row).__name__}")


def refused(file: Path, line: int | str, why: str) -> DataError:
    """The error for a line."""
    return DataError(
        f"calibration data {file}, line {line}",
        value=why,
        rule="a .jsonl file holds one JSON object per line, a .json file objects or a list",
        remedy="mend or remove that line",
    )


def _scan(data: bytes, state: _State) -> tuple[_State, int, npt.NDArray[np.intp]]:
    """The state after a chunk, the deepest nesting in it, and where its lines end.

    Blocks of lines are parsed side by side, so that what is wrong with one line must not hide the
    next one: a string ends with its line, and closing brackets too many count nothing.
    """
    places = np.flatnonzero(np.frombuffer(data.translate(_SIGNS), dtype=np.bool_))
    signs = np.frombuffer(data, dtype=np.uint8)[places]
    is_escaped, quotes = _unescaped_quotes(places, signs, state, len(data))
    newlines = np.flatnonzero(signs == _NEWLINE)
    brackets = np.flatnonzero(_STEPS[signs])
    quotes_before = np.searchsorted(quotes, brackets)
    line = np.searchsorted(newlines, brackets)
    base = np.concatenate([[-int(state.in_string)], np.searchsorted(quotes, newlines)])
    outside = (quotes_before - base[line]) % 2 == 0
    depths = state.depth + np.cumsum(_STEPS[signs[brackets[outside]]], dtype=np.int64)
    rise = depths - np.minimum(np.minimum.accumulate(depths), 0)
    depth = int(rise[-1]) if len(rise) else state.depth
    in_string = bool((len(quotes) - int(base[-1])) % 2)
    return _State(depth, in_string, is_escaped), int(rise.max(initial=0)), places[newlines]


def _unescaped_quotes(
    places: npt.NDArray[np.intp], signs: npt.NDArray[np.uint8], state: _State, size: int
) -> tuple[bool, npt.NDArray[np.intp]]:
    """Whether the chunk ends in a backslash that counts; and which signs are quotes that count."""
    is_quote = signs == _QUOTE
    is_backslash = signs == _BACKSLASH
    if state.is_escaped and len(places) and places[0] == 0:
        is_quote[0] = is_backslash[0] = False
    backslashes = np.flatnonzero(is_backslash)
    if not len(backslashes):
        return False, np.flatnonzero(is_quote)
    # In a run of backslashes every other one is itself escaped.
    where = places[backslashes]
    starts = np.flatnonzero(np.diff(where, prepend=-2) != 1)
    run = np.repeat(starts, np.diff(starts, append=len(where)))
    escaping = backslashes[(np.arange(len(where)) - run) % 2 == 0]
    following = escaping[escaping + 1 < len(places)]
    adjacent = following[places[following + 1] == places[following] + 1]
    is_quote[adjacent + 1] = False
    return int(places[escaping[-1]]) == size - 1, np.flatnonzero(is_quote)
