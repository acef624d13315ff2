"""Bad inputs, made from good ones: JSON with something wrong in it, and bytes that were hit.

Everything is chosen through a `Chooser`: by hypothesis, which makes small what fails, or by a
generator of random numbers, which is ten times faster.
"""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

# What a reader may trip over, in the place of any value.
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 255, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, 10**25),
    *(-(2**63), 0.0, -0.0, 0.5, 1.0, 64.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "1", "64", "true", "None", "..", ".", "/", "../x", "/etc/passwd", "a/b"),
    *("a\\b", "a\nb", "a\0b", "\x1b[2J", "\u202e", "\ud800", "\udcff", "é", "𝄞", "x" * 600),
    *("BF16", "F32", "F4", "bf16", "M", "MEM*", "M" * 2000, "model.safetensors", "-1.safetensors"),
    *([], {}, [[]], [{}], {"": 0}, [0], [1, 2], [-1, 4], [4, 0], [True, 4], [0, 2**63], [0.0, 2.0]),
    *([1] * 9, [1] * 2000, [2**62] * 4, [0, 10**9], ["M"], ["mamba", 7], {"M": 1, "E": 2}),
    *({"dtype": "U8"}, {"__float__": "Infinity"}, {"quant_algo": "NVFP4"}, {"quant_algo": [1]}),
    *(["*"], ["re:(a+)+$"], ["[" * 50], [None], "[", "*" * 60),
]
KEYS = ["", "a", "__metadata__", "weight_map", "dtype", "x" * 600, "a\0", "\ud800", "\n", "é", "0"]
# As text, because json.dumps would not write it: too deep, too long, not a number, no value.
RAW = [
    *("[" * 70 + "]" * 70, "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "1e999", "-1e999"),
    *("9" * 21, "9" * 5000, "0x10", "01", "+1", ".5", "nul", "NaN", "-Infinity", "'a'"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\x"', '"a\nb"', "{,}", "[1,]", '{"a":1,"a":2}', "//"),
    *("\ufeff1", ""),
]
BYTES = [b"", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b'"', b"{", b"}", b",", b"[", b"]", b":"]
_RAW_SIGN = "raw text goes here"


class Chooser:
    """Makes choices.

    Args:
        between: A number from the first to the second, both included.
    """

    def __init__(self, between: Callable[[int, int], int]) -> None:
        self.between = between

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.between(0, len(items) - 1)]

    def once_in(self, times: int) -> bool:
        return self.between(1, times) == times


def broken_json(choose: Chooser, valid: str) -> bytes:
    """A valid text with one to three values changed; now and then it is hit as text as well."""
    value = json.loads(valid)
    for _ in range(choose.between(1, 3)):
        value = _change(choose, value)
    kind = choose.between(0, 9)
    if kind == 0:
        value = _put_in(choose, value, _RAW_SIGN)
    text = json.dumps(value, ensure_ascii=choose.once_in(2))
    data = text.encode("utf-8", "surrogatepass")
    if kind == 0:
        raw = choose.pick(RAW).encode("utf-8", "surrogatepass")
        return data.replace(f'"{_RAW_SIGN}"'.encode(), raw, 1)
    if kind == 1:
        return _double_a_key(choose, data)
    return broken_bytes(choose, data) if kind == 2 else data


def broken_bytes(choose: Chooser, valid: bytes) -> bytes:
    """Bytes flipped, cut out, doubled or put in, in one to four places."""
    data = bytearray(valid)
    for _ in range(choose.between(1, 4)):
        place = choose.between(0, max(len(data) - 1, 0))
        kind = choose.between(0, 8)
        if kind <= 2 and data:
            data[place] ^= 1 << choose.between(0, 7)
        elif kind <= 4:
            del data[place : place + choose.between(1, 64)]
        elif kind <= 6:
            data[place:place] = choose.pick(BYTES)
        elif kind == 7:
            data[place:place] = data[place : place + choose.between(1, 64)]
        else:
            del data[place:]
    return bytes(data)


def _change(choose: Chooser, value: Any) -> Any:
    """Follows a path down, and changes what is there."""
    if isinstance(value, (dict, list)) and value and not choose.once_in(8):
        key = choose.pick(list(value) if isinstance(value, dict) else range(len(value)))
        kind = choose.between(0, 11)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[choose.pick(KEYS)] = copy.deepcopy(value[key])
        elif kind == 2 and isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        else:
            value[key] = _change(choose, value[key])
        return value
    if isinstance(value, int) and not isinstance(value, bool) and choose.once_in(2):
        return value + choose.pick([-1, 1, -8, 8, 2**32])
    return copy.deepcopy(choose.pick(NASTY))


def _put_in(choose: Chooser, value: Any, what: str) -> Any:
    if isinstance(value, (dict, list)) and value and not choose.once_in(6):
        key = choose.pick(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = _put_in(choose, value[key], what)
        return value
    return what


def _double_a_key(choose: Chooser, data: bytes) -> bytes:
    """The first key of an object stands in it twice."""
    places = [place for place in range(len(data)) if data[place : place + 2] == b'{"']
    if not places:
        return data
    place = choose.pick(places) + 1
    end = data.find(b'"', place + 1) + 1
    return data[:place] + data[place:end] + b":0," + data[place:]
