"""The plan as a person reads it: sizes first, then groups, ranks, notes and refusals."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.memory import MemoryPlan
from pipeline.plan import GroupPlan, Plan
from pipeline.plan_ranks import GB

MOST_RANKS = 8


def print_json(values: dict[str, Any], console: Console | None = None) -> None:
    """Prints one JSON object."""
    console = console or Console()
    console.file.write(json.dumps(values, indent=2) + "\n")


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints the tables; fits 80 columns, and stays plain text in a pipe."""
    console = console or Console(highlight=False)
    layers = ", ".join(f"{count} {kind}" for kind, count in plan.layers.items() if count)
    console.print(Text(f"recipe   {plan.recipe}"))
    console.print(Text(f"layers   {sum(plan.layers.values())}: {layers}"))
    console.print(Text(f"layout   {plan.layout}"))
    size = f"{_gb(plan.bf16_bytes)} -> {_gb(plan.quantized_bytes)}"
    bits = f"{plan.effective_bits:.2f} bits per parameter"
    console.print(Text(f"size     {size}, {bits}", style="bold"))
    console.print(Text(f"shards   about {plan.files} files; KV cache {plan.kv_cache}"))
    forward = "calibrated by a forward pass" if plan.needs_forward else "no forward pass needed"
    console.print(Text(f"scales   {forward}"))
    console.print(_group_table(plan.groups))
    if plan.per_rank:
        console.print(_rank_table(plan))
    if plan.memory is not None and plan.needs_forward:
        console.print(Text(f"memory   {describe_memory(plan.memory)}"))
        size = _gb(plan.snapshot_bytes)
        text = f"beside the checkpoint {size} for each snapshot of the hidden states"
        console.print(Text(f"disk     {text}, one more than snapshots.keep"))
    if plan.unmatched_patterns:
        console.print(Text(f"note     {describe_unmatched(plan.unmatched_patterns)}"))
    for note in plan.notes:
        console.print(Text(f"note     {note}", style="yellow"))
    for refusal in plan.refusals:
        console.print(Text(f"refused  {refusal}", style="bold red"))


def describe_unmatched(patterns: list[str], most: int = 2) -> str:
    """One line about the recipe's patterns that match nothing (a shared recipe has many)."""
    shown = ", ".join(repr(pattern) for pattern in patterns[:most])
    more = f" and {len(patterns) - most} more (run.json, output=json)" * (len(patterns) > most)
    return f"patterns of the recipe that match nothing in this model: {shown}{more}"


def describe_memory(memory: MemoryPlan) -> str:
    """One line about a rank's device and host memory."""
    where = "2 micro-batches of hidden states" if memory.hidden_on_host else "hidden states"
    return (
        f"at most {_gb(memory.peak)} of the device: slots {_gb(memory.slots)}, "
        f"{where} {_gb(memory.hidden)}, activations {_gb(memory.activations)}, "
        f"packing {_gb(memory.packing)}, evaluation {_gb(memory.evaluation)}; "
        f"micro-batches of {memory.micro_batch}; "
        f"host {_gb(memory.host)}"
    )


def _group_table(groups: list[GroupPlan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for header in ("kind", "format", "inputs"):
        table.add_column(header, overflow="fold")
    for header in ("layers", "tensors", "params", "source", "stored"):
        table.add_column(header, justify="right", no_wrap=True)
    for group in groups:
        table.add_row(
            group.role.replace("_", " "),
            f"{group.format} {group.method}".replace("four_over_six", "4-over-6").strip(),
            group.activations,
            str(group.layers or ""),
            f"{group.tensors:,}",
            _count(group.parameters),
            _gb(group.source_bytes),
            _gb(group.stored_bytes),
        )
    return table


def _rank_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for header in ("rank", "slots", "read ahead (host)", "reads", "writes"):
        table.add_column(f"{header}" if header == "rank" else f"{header} GB", justify="right")
    for rank in plan.per_rank[:MOST_RANKS]:
        sizes = (rank.slot_gb, rank.read_ahead_gb, rank.reads_gb, rank.writes_gb)
        table.add_row(str(rank.rank), *(_size(size) for size in sizes))
    if len(plan.per_rank) > MOST_RANKS:
        table.add_row("...", *([""] * 4))
    return table


def _gb(count: int) -> str:
    """A size with its unit, in powers of ten."""
    if count >= 1000 * GB:
        return f"{count / GB:,.0f} GB"
    for unit, scale in (("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _size(size: float) -> str:
    return f"{size:,.1f}" if size >= 1 else f"{size:.4f}"


def _count(parameters: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= scale:
            return f"{parameters / scale:.1f} {unit}"
    return str(parameters)
