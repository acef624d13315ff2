"""From a directory of parts to a published checkpoint: names, index, configs, one rename.

In: the work directory of a run, whose layers are all committed. Out: the final directory. The
caller audits `work.files` between `publish` and `finalize`. Every step may be interrupted: the
new names are noted before the first file gets one, and a restart gives the old names back.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.durable import copy_file
from pipeline.checkpoint.links import refuse_links
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES
from pipeline.checkpoint.source_files import INDEX_NAME, is_weight_file
from pipeline.checkpoint.strict_json import read_json_file, shown
from pipeline.checkpoint.writer import FileRecord, sync_directory, write_bytes, write_json
from pipeline.errors import OutputError

_RENAMES = "renames.json"


@dataclasses.dataclass(frozen=True)
class WorkDirectory:
    """Where a run works: `NAME.partial` beside the output directory `NAME`.

    Attributes:
        final: The output directory, which appears by one rename.
        root: The work directory.
        is_rehearsal: Nothing of the checkpoint is written: `final` is the report's directory, and
            `root` lies in it. There is nothing that a later run could go on from.
    """

    final: Path
    root: Path
    is_rehearsal: bool = False

    @classmethod
    def beside(cls, final: Path) -> WorkDirectory:
        """The work directory of an output directory."""
        final = Path(os.path.abspath(final.expanduser()))
        return cls(final, final.with_name(final.name + ".partial"))

    @property
    def rejected(self) -> Path:
        """The name of a finished directory that missed a gate."""
        return self.final.with_name(self.final.name + ".rejected")

    @property
    def files(self) -> Path:
        """What becomes the final directory."""
        return self.root / "checkpoint"

    @property
    def journal(self) -> Path:
        """The journal's directory."""
        return self.root / "journal"

    @property
    def state(self) -> Path:
        """The ranks' signs of life, and the first failure."""
        return self.root / "state"

    @property
    def attempts(self) -> Path:
        """How each attempt began and ended."""
        return self.root / "attempts.jsonl"

    @property
    def stop(self) -> Path:
        """Whoever makes this file asks the run to stop."""
        return self.root / "stop"

    @property
    def snapshots(self) -> Path:
        """The hidden states between two layers, for a restart."""
        return self.root / "snapshots"

    @property
    def metrics(self) -> Path:
        """The figures of the progress lines, which grow during the run."""
        return self.root / "metrics.jsonl"


def check_output(final: Path, source: Path | None = None) -> WorkDirectory:
    """Checks, before any work, that a run may write to `final`; one rank calls it.

    Creates the parents of `final` and nothing else.

    Args:
        final: The output directory.
        source: The source directory, which must lie elsewhere.

    Raises:
        OutputError: A file or foreign directory is in the way, the parent is not writable, or
            output and source overlap.
    """
    work = WorkDirectory.beside(final)
    if source is not None:
        refuse_overlap(work.final, source.resolve())
    if work.final.is_symlink():
        raise OutputError(
            f"output {work.final}",
            value=f"a symbolic link to {os.readlink(work.final)}",
            rule="the finished directory appears by a rename, which does not follow links",
            remedy="give the directory that it points to as output",
        )
    if work.final.exists() and (not work.final.is_dir() or any(work.final.iterdir())):
        kind = "a directory with files in it" if work.final.is_dir() else "a file"
        raise OutputError(
            f"output {work.final}",
            value=kind,
            rule="must not exist, or be empty: finished checkpoints are never overwritten",
            remedy="choose another output, or remove it",
        )
    if work.rejected.is_symlink() or work.rejected.exists():
        raise OutputError(
            f"output {work.final}",
            value=f"{work.rejected} is there",
            rule="an earlier run made it, and it missed a gate: it would be in the way of another",
            remedy="look at its report, then remove or rename it, or choose another output",
        )
    refuse_links(work.root, deep=False)
    if work.root.exists() and not work.root.is_dir():
        raise OutputError(
            f"work directory {work.root}",
            value="a file",
            rule="an unfinished run keeps its parts there",
            remedy="choose another output, or remove it",
        )
    if work.root.is_dir() and any(work.root.iterdir()) and not work.journal.is_dir():
        raise OutputError(
            f"work directory {work.root}",
            value="a directory with files in it and no journal",
            rule="must not exist, be empty, or be an unfinished run that can go on",
            remedy="choose another output, or remove it",
        )
    try:
        work.final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work.final.parent):
            pass
    except OSError as problem:
        raise OutputError(
            f"output {work.final}",
            value=f"{work.final.parent} is not writable ({problem.strerror})",
            rule="the parent directory must be writable",
            remedy="choose another output",
        ) from problem
    return work


def prepare(work: WorkDirectory) -> None:
    """Makes the work directory, and takes back the names of an interrupted publication."""
    refuse_links(work.final if work.is_rehearsal else work.root, deep=True)
    if work.is_rehearsal:
        for leftover in (work.files, work.journal, work.metrics, work.state, work.attempts):
            _remove(leftover)
    work.files.mkdir(parents=True, exist_ok=True)
    work.journal.mkdir(parents=True, exist_ok=True)
    plan = work.journal / _RENAMES
    if not plan.exists():
        return
    try:
        renames = _read_renames(plan)
    except (OSError, ValueError) as problem:
        raise OutputError(
            str(plan),
            value=f"unreadable ({problem})",
            rule="it holds the names of the parts of an unfinished run",
            remedy=f"remove the directory {work.root} to start from the beginning",
        ) from problem
    for old, new in renames.items():
        if (work.files / new).exists():
            os.rename(work.files / new, work.files / old)
    _remove_all_but(work.files, set(renames))
    sync_directory(work.files)
    plan.unlink()


def publish(
    work: WorkDirectory,
    files: Sequence[FileRecord],
    *,
    config: Mapping[str, Any],
    hf_quant_config: Mapping[str, Any] | None,
    small_files: Mapping[str, Path],
    extra: Mapping[str, bytes] | None = None,
) -> list[FileRecord]:
    """Gives the files their final names and writes everything that goes with them.

    Args:
        work: The work directory; every recorded file lies in `work.files`.
        files: In the order of the published shards.
        config: The new config.json.
        hf_quant_config: The new hf_quant_config.json; None for an unquantized checkpoint.
        small_files: Relative path to source path of files that are copied as they are.
        extra: Relative path to content of further files (reports).

    Returns:
        The records under their final names.

    Raises:
        OutputError: A file is not there, a name is taken twice, or writing failed.
    """
    named = final_records(files)
    plan = {old.name: new.name for old, new in zip(files, named, strict=True)}
    write_json(work.journal / _RENAMES, plan)
    _remove_all_but(work.files, {*plan, *plan.values()})  # parts left over by another layout
    for old, new in plan.items():
        if (work.files / old).exists():
            os.rename(work.files / old, work.files / new)
        elif not (work.files / new).exists():
            raise OutputError(
                str(work.files / old),
                value="no such file",
                rule="every recorded file must be there",
                remedy="start the same command again; the layer will be done again",
            )
    for relative, path in small_files.items():
        target = work.files / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, target)
    for relative, data in (extra or {}).items():
        _write(work.files, relative, data)
    write_json(work.files / INDEX_NAME, make_index(named))
    if hf_quant_config is not None:
        write_json(work.files / "hf_quant_config.json", hf_quant_config)
    # NVIDIA's config.json says "time_step_limit": [0.0, Infinity]; it goes out as it came in.
    write_json(work.files / "config.json", config, allow_nan=True)
    sync_directory(work.files)
    return named


def finalize(work: WorkDirectory, *, rejected: bool = False) -> Path:
    """Makes the checkpoint appear under its final name by one rename; returns that directory.

    Args:
        work: Everything lies in `work.files`.
        rejected: The name is that of a checkpoint that missed a gate.

    Raises:
        OutputError: The final name was taken meanwhile.
    """
    final = work.rejected if rejected else work.final
    try:
        os.rename(work.files, final)  # replaces an empty directory, and nothing else
    except OSError as problem:
        raise OutputError(
            f"output {final}",
            value=f"cannot be renamed from {work.files} ({problem.strerror})",
            rule="must not exist, or be empty",
            remedy=f"remove it, then run: mv {work.files} {final}",
        ) from problem
    sync_directory(final.parent)
    shutil.rmtree(work.root, ignore_errors=True)
    return final


def final_records(files: Sequence[FileRecord]) -> list[FileRecord]:
    """The files under their final names, in order."""
    count = len(files)
    return [
        dataclasses.replace(file, name=f"model-{number:05d}-of-{count:05d}.safetensors")
        for number, file in enumerate(files, start=1)
    ]


def make_index(files: Sequence[FileRecord]) -> dict[str, Any]:
    """The content of the index file.

    Raises:
        OutputError: A tensor is in two files.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        for name, (dtype, shape) in file.tensors.items():
            if name in weight_map:
                raise OutputError(
                    name,
                    value=f"in {weight_map[name]} and in {file.name}",
                    rule="a tensor must be written once",
                    remedy="report this; no user setting should lead here",
                )
            weight_map[name] = file.name
            size = TORCH_DTYPES[dtype].itemsize
            for length in shape:
                size *= length
            total += size
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def refuse_overlap(final: Path, source: Path) -> None:
    """Refuses an output directory that lies in the source's, or the source's in it.

    Raises:
        OutputError: One of the two.
    """
    target = final.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise OutputError(
            f"output {final}",
            value=f"the source is {source}",
            rule="output and source must not lie in each other",
            remedy="choose another output",
        )


def _read_renames(plan: Path) -> dict[str, str]:
    """New by old names; OSError or ValueError where it does not hold them."""
    renames = read_json_file(plan)
    if not isinstance(renames, dict):
        raise ValueError(f"a JSON {type(renames).__name__}")
    for pair in renames.items():
        for name in pair:
            if not (isinstance(name, str) and is_weight_file(name)):
                raise ValueError(f"{shown(name)} is no name of a weight file")
    if len(set(renames.values())) != len(renames):
        raise ValueError("a name is given twice")
    return renames


def _remove_all_but(directory: Path, names: set[str]) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.relative_to(directory).as_posix() not in names:
            path.unlink()


def _write(directory: Path, relative: str, data: bytes) -> None:
    path = directory / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
