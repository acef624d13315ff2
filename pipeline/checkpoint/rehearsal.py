"""A run that writes no checkpoint: where its report goes, and what can be checked without files.

In: the report's directory; later the records of the files that a real run would have written. Out:
a work directory inside it, and an `AuditResult` of what was counted. A real run's audit reads its
files; here the records, which the writer made as it packed, must add up to the plan.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.architecture import Architecture, expected_tensors
from pipeline.checkpoint import audit_config, audit_tensors
from pipeline.checkpoint.audit import AuditResult
from pipeline.checkpoint.durable import write_text
from pipeline.checkpoint.links import refuse_links
from pipeline.checkpoint.publish import WorkDirectory, make_index, refuse_overlap
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo
from pipeline.checkpoint.source_files import INDEX_NAME
from pipeline.checkpoint.writer import FileRecord
from pipeline.errors import OutputError

NOTE = "rehearsal.txt"
"""By this file a rehearsal's directory is known."""
NOTE_TEXT = (
    "The report of a rehearsal (layersweep-calibrate output=discard).\n"
    "Everything was packed, counted and checksummed as in a real run; no checkpoint was written.\n"
    "SHA256SUMS lists the weight files that a real run would have made.\n"
)
_WORK = ".work"


def check_rehearsal(directory: Path, source: Path | None = None) -> WorkDirectory:
    """Checks, before any work, that a rehearsal may write its report to `directory`.

    Args:
        directory: Of the report; a rehearsal's earlier report there will be replaced.
        source: The source directory, which must lie elsewhere; None for random weights.

    Raises:
        OutputError: Something else is there, it is not writable, or it lies in the source.
    """
    named = Path(os.path.abspath(directory.expanduser()))
    refuse_links(named, deep=False)
    final = Path(os.path.realpath(named))
    if source is not None:
        refuse_overlap(final, source.resolve())
    for parent in final.parents:
        if parent.name.endswith(".partial") or (parent / INDEX_NAME).is_file():
            raise OutputError(
                f"report {final}",
                value=f"inside {parent}",
                rule="must not lie in a checkpoint, or in the work directory of one",
                remedy="choose another directory with report=DIR",
            )
    if final.exists() and not _is_rehearsal(final):
        raise OutputError(
            f"report {final}",
            value="a directory with files in it" if final.is_dir() else "a file",
            rule="must not exist, be empty, or be the report of another rehearsal",
            remedy="choose another directory with report=DIR, or remove it",
        )
    nearest = next(path for path in (final, *final.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as problem:
        raise OutputError(
            f"report {final}",
            value=f"{nearest} is not writable ({problem.strerror})",
            rule="the report goes there",
            remedy="choose another directory with report=DIR",
        ) from problem
    return WorkDirectory(final, final / _WORK, is_rehearsal=True)


def check_counts(
    files: Sequence[FileRecord],
    config: Mapping[str, Any],
    *,
    expected_bytes: int,
    expected_effective_bits: float,
) -> AuditResult:
    """Compares what would have been written with what was planned; never raises for a difference.

    Args:
        files: Under their final names.
        config: The config.json that would go with them.
        expected_bytes: Planned size of all tensors (without headers).
        expected_effective_bits: Planned effective bits.

    Raises:
        OutputError: A tensor is in two files.
    """
    make_index(files)
    tensors = {info.name: info for file in files for info in _infos(file)}
    result = AuditResult(Path("discard"))
    architecture = Architecture.from_hf_config(config)
    specs = expected_tensors(architecture)
    declared, problems = audit_config.read_declared(config["quantization_config"], specs)
    result.record("config.json", problems, f"{len(declared.algorithms)} quantized projections")
    expected = audit_tensors.expected_of(architecture, specs, declared, tensors)
    keys, stored = audit_tensors.check_keys(expected, tensors)
    result.record("key set", keys, f"exactly the {len(expected)} expected tensors")
    result.record("shapes and dtypes", stored, "as expected")
    result.record("mtp", audit_tensors.check_mtp(architecture, tensors), "as promised")
    figures = result.figures
    figures.tensors = len(tensors)
    figures.file_bytes = sum(file.bytes for file in files)
    figures.tensor_bytes = sum(info.nbytes for info in tensors.values())
    figures.parameters = audit_tensors.count_parameters(specs, tensors)
    figures.effective_bits = audit_tensors.effective_bits(figures.parameters, tensors)
    sizes = []
    if figures.tensor_bytes != expected_bytes:
        sizes.append(f"{figures.tensor_bytes:,} bytes instead of the planned {expected_bytes:,}")
    if not math.isclose(figures.effective_bits, expected_effective_bits, abs_tol=1e-6):
        sizes.append(
            f"{figures.effective_bits:.6f} effective bits instead of the planned "
            f"{expected_effective_bits:.6f}"
        )
    result.record("size", sizes, f"{figures.tensor_bytes:,} bytes")
    return result


def mark_rehearsal(work: WorkDirectory) -> None:
    """Marks the report's directory as a rehearsal's."""
    write_text(work.final / NOTE, NOTE_TEXT)


def finish_rehearsal(work: WorkDirectory) -> None:
    """Removes the work directory."""
    shutil.rmtree(work.root, ignore_errors=True)


def _is_rehearsal(directory: Path) -> bool:
    """Whether a directory is empty, or holds a rehearsal's report or an unfinished rehearsal."""
    if not directory.is_dir():
        return False
    names = {path.name for path in directory.iterdir()}
    return NOTE in names or names <= {_WORK}


def _infos(file: FileRecord) -> list[TensorInfo]:
    """The tensors of a file that is not there; their places in it are not known."""
    return [
        TensorInfo(
            name, dtype, shape, Path(file.name), 0, math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        )
        for name, (dtype, shape) in file.tensors.items()
    ]
