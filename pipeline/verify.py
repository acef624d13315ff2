"""Answering `launch.verify`: an audit, printed.

In: a `VerifyConfig`. Out: a table or JSON on standard output, and the exit status.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.checkpoint.audit import AuditResult, audit
from pipeline.checkpoint.source import open_source
from pipeline.config import PlanOutput, VerifyConfig
from pipeline.errors import AuditError, ConfigError
from pipeline.report.plan_table import print_json
from pipeline.report.summary import format_bytes

CHECKSUMS = Path("layersweep") / "SHA256SUMS"
MOST_SHOWN = 5


def verify(config: VerifyConfig) -> int:
    """Audits a directory and prints the result; returns 0 if every rule holds, else 1.

    Raises:
        ConfigError: No such directory.
        AuditError: Its file of checksums is torn.
        SourceError: The source cannot be opened.
    """
    directory = Path(config.directory or "")
    if not config.directory or not directory.is_dir():
        raise ConfigError(
            "directory",
            value=config.directory or "nothing",
            rule="must be an existing checkpoint directory",
            remedy="python -m launch.verify DIR [source=DIR]",
        )
    start = time.monotonic()
    source = None if config.source is None else open_source(config.source)
    checksums = read_checksums(directory / CHECKSUMS)
    result = audit(directory, source=source, checksums=checksums, hopper=config.hopper)
    if checksums is None:
        result.notes.append(f"checksums: not checked (no {CHECKSUMS.name})")
    if source is None:
        result.notes.append("weights: not compared with their source (no source=)")
    seconds = time.monotonic() - start
    if config.output is PlanOutput.json:
        values = dataclasses.asdict(result)
        print_json({**values, "directory": str(directory), "ok": result.ok, "seconds": seconds})
    else:
        _print(result, seconds, Console(highlight=False))
    return 0 if result.ok else 1


def read_checksums(path: Path) -> dict[str, str] | None:
    """SHA-256 by file name from a file in the format of sha256sum; None where there is none."""
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    except ValueError as problem:
        raise AuditError(
            str(path),
            value="a torn file",
            rule="every line holds a digest and a file name, as sha256sum writes them",
            remedy="fetch the directory again, or remove the file to audit without checksums",
        ) from problem


def _print(result: AuditResult, seconds: float, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("rule")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in result.checks:
        mark = Text("ok", style="green") if check.ok else Text("FAILED", style="bold red")
        table.add_row(check.name, mark, Text(check.detail))
    console.print(table)
    for problem in result.problems:
        console.print(Text(f"problem  {problem}", style="red"))
    for note in result.notes:
        console.print(Text(f"note     {note}", style="yellow"))
    figures = result.figures
    worst = sorted(figures.relative_errors.items(), key=lambda item: -item[1])[:MOST_SHOWN]
    for module, error in worst:
        console.print(Text(f"error    {error:8.4%}  {module}"))
    count = len(result.problems)
    verdict = "passed" if result.ok else f"FAILED: {count} problem{'s' * (count != 1)}"
    console.print(
        Text(
            f"audit {verdict}: {figures.tensors:,} tensors, {format_bytes(figures.tensor_bytes)}, "
            f"{figures.effective_bits:.2f} bits per parameter, {seconds:.1f} s",
            style="bold green" if result.ok else "bold red",
        )
    )
