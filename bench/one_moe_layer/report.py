"""What both sides' figures say: the ratios, and a table for the terminal.

In: the record that `bench/vs_modelopt.py` writes as JSON. Out: ratios; text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

Side = dict[str, Any]


def best(side: Side, name: str) -> tuple[float, str] | None:
    """Most tokens per second of a measurement, and its micro-batch."""
    rates = side.get(name, {})
    found = [(rate["tokens_per_s"], batch) for batch, rate in rates.items() if "error" not in rate]
    return max(found, default=None)


def seconds(side: Side) -> dict[str, float | None]:
    """Seconds of every step that a side tells apart."""
    search, pack, write = (
        side.get(name) for name in ("choose_weight_scales_s", "pack_s", "write_s")
    )
    choose_and_pack, everything = side.get("choose_and_pack_s"), side.get("choose_pack_write_s")
    if search is not None and pack is not None:
        choose_and_pack = search + pack
        everything = None if write is None else choose_and_pack + write
    return {
        "choose weight scales": search,
        "choose and pack": choose_and_pack,
        "choose, pack and write": everything,
    }


def summarize(sides: dict[str, Side]) -> dict[str, float]:
    """How many times faster ours is, by step; only where both were measured."""
    ours, theirs = sides.get("ours", {}), sides.get("modelopt", {})
    ratios = {}
    for name in ("plain_forward", "calibrate"):
        a, b = best(ours, name), best(theirs, name)
        if a and b:
            ratios[name] = a[0] / b[0]
    for name, value in seconds(ours).items():
        other = seconds(theirs)[name]
        if value is not None and other is not None:
            ratios[name] = other / value
    return ratios


def show(result: dict[str, Any]) -> None:
    """Prints the table, the comparison and the remarks."""
    console = Console(width=110, highlight=False)
    console.print(_table(result))
    if "comparison" in result:
        for line in _comparison(result["comparison"]):
            console.print(line)
    for name, side in result["sides"].items():
        for note in side["notes"]:
            console.print(f"{name}: {note}", markup=False)
        if "error" in side:
            console.print(f"{name} FAILED: {side['error']}", markup=False)
    for note in result["notes"]:
        console.print(note, markup=False)


def _table(result: dict[str, Any]) -> Table:
    sides, ratios = result["sides"], result["ratios"]
    hardware = result["hardware"]
    title = f"One MoE layer ({result['shape']}), {hardware.get('gpu', 'CPU')}, {result['date']}"
    table = Table("", "Model Optimizer", "Layersweep", "ratio", title=title)
    ours, theirs = sides.get("ours", {}), sides.get("modelopt", {})

    def add(label: str, cells: Iterable[str], ratio: float | None = None) -> None:
        table.add_row(label, *cells, "" if ratio is None else f"{ratio:.3g}x")

    for name, label in (
        ("plain_forward", "forward alone, tokens/s"),
        ("calibrate", "calibrating, tokens/s"),
    ):
        cells = [_best_cell(best(side, name)) for side in (theirs, ours)]
        add(label, cells, ratios.get(name))
        for batch in sorted(theirs.get(name, {}) | ours.get(name, {}), key=int):
            cells = [_rate_cell(side.get(name, {}).get(batch)) for side in (theirs, ours)]
            add(f"    micro-batch {batch}", cells)
    for name in seconds({}):
        cells = [_number(seconds(side)[name], "s") for side in (theirs, ours)]
        add(name, cells, ratios.get(name))
    for key, label, unit in (
        ("write_s", "    of it: writing", "s"),
        ("export_peak_gib", "peak memory while exporting", "GiB"),
    ):
        add(label, (_number(side.get(key), unit) for side in (theirs, ours)))
    add("exported", (_number(_gigabytes(side), "GB") for side in (theirs, ours)))
    compiled = _number(theirs.get("compile_extensions_s"), "s")
    add("compiling extensions (not counted)", (compiled, ""))
    return table


def _comparison(found: dict[str, Any]) -> list[str]:
    nvfp4, copied = found["nvfp4"], found["copied"]
    lines = [
        f"NVFP4: {nvfp4['differing_tensors']} of {nvfp4['tensors']} tensors differ, "
        f"{nvfp4['differing_weight_scale_2']} of them in weight_scale_2, the others in "
        f"{nvfp4['differing_blocks']} of {nvfp4['blocks']} blocks (ours errs less in "
        f"{nvfp4['blocks_where_ours_errs_less']}, theirs in "
        f"{nvfp4['blocks_where_theirs_errs_less']}; equal scale, other codes: "
        f"{nvfp4['blocks_of_equal_scale_with_other_codes']})"
    ]
    for name, tensor in found["fp8"].items():
        lines.append(
            f"FP8 {name}: {tensor['differing_bytes']} of {tensor['bytes']} bytes differ "
            f"({tensor['unexplained_bytes']} not because theirs is rounded to BF16 first), "
            f"weight_scale by {tensor['scale_deviation']:.2g} (multiplier "
            f"{tensor['multiplier']:.3g}), squared error ours "
            f"{tensor['squared_error']['ours']:.6g}, theirs {tensor['squared_error']['theirs']:.6g}"
        )
    scalars = found["input_scale"]
    deviations = ", ".join(
        f"{kind} {value:.2g}" for kind, value in scalars["largest_relative_deviation"].items()
    )
    lines.append(f"input_scale ({scalars['scalars']}), largest relative deviation: {deviations}")
    lines.append(f"copied: {len(copied['differing'])} of {copied['tensors']} tensors differ")
    for key in ("only_ours", "only_theirs"):
        if found[key]:
            lines.append(f"{key}: {', '.join(found[key])}")
    return lines


def _best_cell(found: tuple[float, str] | None) -> str:
    return "" if found is None else f"{found[0]:,.0f} (micro-batch {found[1]})"


def _rate_cell(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return ""
    if "error" in rate:
        return str(rate["error"])
    peak = "" if rate["peak_gib"] is None else f"; {rate['peak_gib']:.1f} GiB"
    return f"{rate['tokens_per_s']:,.0f} ({rate['calls']} calls, {rate['seconds']:.2f} s{peak})"


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}"


def _gigabytes(side: Side) -> float | None:
    return side["exported_bytes"] / 1e9 if "exported_bytes" in side else None
