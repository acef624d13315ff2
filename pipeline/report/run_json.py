"""`run.json`: the whole report as one JSON file, for scripts and for later comparison.

In: a `RunReport`. Out: a file that appears by one rename, and the same record read back. A
`summary` (verdicts, warnings, totals by kind) is written for scripts and ignored on reading. JSON
has no NaN or Inf: they are written as null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

from pipeline.checkpoint.durable import write_text
from pipeline.checkpoint.strict_json import read_json_file
from pipeline.errors import OutputError
from pipeline.evaluation.records import restore
from pipeline.report.fidelity import all_warnings, describe_fidelity
from pipeline.report.records import (
    AgainstMax,
    ExpertCoverage,
    KindReport,
    KVAmax,
    LayerReport,
    RunReport,
)
from pipeline.report.summary import summarize_kinds, verdict

SCHEMA = 1


def write_run_json(report: RunReport, path: Path) -> None:
    """Write the report, replacing an older file in one step."""
    kinds = [dataclasses.asdict(kind) for kind in summarize_kinds(report)]
    summary = {"verdict": verdict(report), "warnings": all_warnings(report), "kinds": kinds}
    if report.evaluation is not None:
        summary["fidelity"] = describe_fidelity(report.evaluation)
    content = {"schema": SCHEMA, "summary": summary, **dataclasses.asdict(report)}
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def read_run_json(path: Path) -> RunReport:
    """Read a report back.

    Raises:
        OutputError: The file is missing, is not JSON, or has another schema.
    """
    try:
        content = read_json_file(path)
        schema = content.pop("schema")
        if schema != SCHEMA:
            raise OutputError(
                str(path),
                value=f"schema {schema}",
                rule=f"this version reads schema {SCHEMA}",
                remedy="read it with the version that wrote it",
            )
        content.pop("summary", None)
        for layer in content["layers"]:
            layer["kinds"] = [_build(KindReport, kind) for kind in layer["kinds"]]
        content["layers"] = [_build(LayerReport, layer) for layer in content["layers"]]
        content["outside"] = [_build(KindReport, kind) for kind in content["outside"]]
        content["coverage"] = [_build(ExpertCoverage, item) for item in content["coverage"]]
        content["kv_amax"] = [_build(KVAmax, item) for item in content["kv_amax"]]
        if content.get("evaluation") is not None:
            content["evaluation"] = restore(content["evaluation"])
        if content.get("against_max") is not None:
            content["against_max"] = _build(AgainstMax, content["against_max"])
        return _build(RunReport, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise OutputError(
            str(path),
            value=f"{type(error).__name__}: {error}",
            rule="run.json is what a run wrote at its end",
            remedy="run again, or point to the directory of a finished run",
        ) from error


def finite(value: Any) -> Any:
    """Return a JSON-like value with every NaN and Inf replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _build[Record](record: type[Record], content: dict[str, Any]) -> Record:
    """Build a record; null in a field of plain floats was NaN or Inf."""
    types = {field.name: field.type for field in dataclasses.fields(cast(Any, record))}
    values = {name: _with_nan(value, types.get(name)) for name, value in content.items()}
    return record(**values)


def _with_nan(value: Any, annotation: object) -> Any:
    if annotation == "float" and value is None:
        return math.nan
    if annotation == "dict[str, float]":
        return {key: math.nan if item is None else item for key, item in value.items()}
    return value
