"""JSON from files that somebody else may have written: read strictly, in bounded time and memory.

In: bytes, or a path. Out: plain values, or a `ValueError` that says what is wrong. `json.loads`
alone takes the last of two equal keys, NaN, numbers that overflow, halves of surrogate pairs and
any encoding of Unicode; deep nesting makes it raise a `RecursionError`, and a file of one megabyte
of brackets becomes a hundred of lists.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.checkpoint.regular_files import read_regular

MAX_BYTES = 100_000_000
"""Of a file, as much as a safetensors header may have (safetensors/src/tensor.rs)."""
MAX_ITEMS = 4_000_000
"""Brackets, braces and commas: the values that a file may hold; 500,000 tensors need as many."""
MAX_DEPTH = 64
_MAX_DIGITS = 20  # 2**64 has 20
_SHOWN = reprlib.Repr(maxstring=120, maxother=120, maxlist=8, maxtuple=8, maxdict=4)


def read_json_file(path: Path, *, allow_nan: bool = False, most_bytes: int = MAX_BYTES) -> Any:
    """The value in a file.

    Args:
        path: A regular file, or a link to one.
        allow_nan: Accept NaN, Infinity and -Infinity.
        most_bytes: Longest file.

    Raises:
        OSError: Missing, unreadable, no regular file, or too long.
        ValueError: Not JSON, or JSON that is refused; the message says why.
    """
    return parse_json(read_regular(path, most_bytes), allow_nan=allow_nan)


def parse_json(data: bytes, *, allow_nan: bool = False) -> Any:
    """The value in UTF-8 text.

    Raises:
        ValueError: Not JSON, or JSON that is refused; the message says why.
    """
    items = sum(data.count(sign) for sign in (b"[", b"{", b","))
    if items > MAX_ITEMS:
        raise ValueError(f"{items:,} brackets, braces and commas, more than {MAX_ITEMS:,}")
    constant: Callable[[str], float] = float if allow_nan else _refuse_constant
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=constant,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _refuse_depth(value)
    return value


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; True and False, which Python counts among them, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value for a message, cut where it is long: its repr may be a hundred megabytes."""
    return _SHOWN.repr(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{shown(name)} appears twice")
            seen.add(name)
    return values


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS + digits.startswith("-"):
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"a number that overflows: {shown(digits)}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _refuse_depth(value: Any) -> None:
    """Level by level; also strings that hold half of a surrogate pair, which UTF-8 cannot write."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    _refuse_surrogates(key)
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                _refuse_surrogates(item)
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _refuse_surrogates(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"half of a surrogate pair in {shown(text)}") from None
