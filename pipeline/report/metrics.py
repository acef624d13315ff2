"""`metrics.jsonl`: the figures of the progress lines, one JSON object per line, as they come.

In: names and numbers. Out: a file that can be followed while the run goes on. A restarted run
appends to it; a line that a killed run left unfinished is closed off and skipped on reading.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.checkpoint.durable import open_to_append
from pipeline.checkpoint.strict_json import parse_json
from pipeline.report.run_json import finite


class MetricsWriter:
    """Appends one line per call and flushes it; a context manager.

    Args:
        path: The file; its directory must exist.
    """

    def __init__(self, path: Path) -> None:
        unfinished = path.exists() and not _ends_a_line(path)
        self._file = os.fdopen(open_to_append(path), "a", encoding="utf-8")
        if unfinished:
            self._file.write("\n")

    def write(self, **values: Any) -> None:
        """Append `values` (JSON types) with the Unix time in seconds under `time`."""
        line = json.dumps({"time": round(time.time(), 3), **finite(values)}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()


def _ends_a_line(path: Path) -> bool:
    """Whether a file is empty or ends with a line end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file in order, without unfinished ones."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
