"""Documents to calibrate on: from files, a hub dataset or the built-in demo text.

In: one `DataSource`. Out: an iterator over its documents in seeded random order, each a text or a
list of chat messages, blank ones left out. Nothing is tokenized here, and rows are read as they are
asked for: local files go through the Arrow cache of `datasets` (so that the whole of them can be
shuffled), hub datasets are streamed (so that only what is used is downloaded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.calibration.json_text import find_broken_line, refuse_hostile_json
from pipeline.errors import ConfigError, DataError

# A text, or the messages of one conversation ({"role": ..., "content": ...}).
Document = str | list[dict[str, Any]]

DEMO = "demo"
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COLUMNS = ("text", "messages")
# Documents that a hub stream is shuffled within, on top of the order of its files.
HUB_SHUFFLE_DOCUMENTS = 10_000


@dataclass(kw_only=True)
class DataSource:
    """One source of calibration text.

    Attributes:
        path: A file (.jsonl, .json, .parquet, .txt), a directory of such files, the name of a hub
            dataset, or `demo` for the built-in text.
        split: Split to read. Files have one, `train`, of which a slice such as `train[:1000]` can
            be taken.
        name: Subset (configuration) of a hub dataset.
        weight: Share of the sequences, relative to the other sources.
    """

    path: str
    split: str = "train"
    name: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the source's own values.

        Raises:
            ConfigError: An empty path, or a weight that is not a positive finite number.
        """
        if not self.path.strip():
            raise ConfigError(
                "path of a data source",
                value=repr(self.path),
                rule="it names a file, a directory, a hub dataset or demo",
                remedy="set data.sources[].path",
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"weight of data source {self.path}",
                value=self.weight,
                rule="a weight is a positive finite number",
                remedy="set it above 0, or leave the source out",
            )


def read_documents(source: DataSource, seed: Sequence[int]) -> Iterator[Document]:
    """Iterate over the documents of a source, in an order that depends on `seed` alone.

    Raises:
        ConfigError: An option that this kind of source does not have.
        DataError: The source cannot be found, reached or parsed, or has no usable column.
    """
    rows: Iterator[Document]
    if source.path == DEMO:
        rows = _read_demo(source, seed)
    elif (path := Path(source.path).expanduser()).exists():
        rows = _read_files(source, path, seed)
    elif _looks_like_a_path(source.path):
        raise DataError(
            f"calibration data {source.path}",
            value="no such file or directory",
            rule="a data source is an existing file or directory, a hub dataset or demo",
            remedy="correct the path",
        )
    else:
        rows = _read_hub(source, seed)
    for row in rows:
        if row is None or len(row) == 0 or (isinstance(row, str) and not row.strip()):
            continue
        yield row


def list_files(path: Path) -> list[Path]:
    """Return the data files at `path` (itself, or all below it), sorted, empty ones left out.

    Raises:
        DataError: There is none.
    """
    found = [path]
    if path.is_dir():
        below = [p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in BUILDERS]
        hidden = {p for p in below if any(x.startswith(".") for x in p.relative_to(path).parts)}
        found = sorted(set(below) - hidden, key=lambda p: p.relative_to(path).as_posix())
    files = [p for p in found if p.suffix.lower() in BUILDERS]
    if not files:
        raise DataError(
            f"calibration data {path}",
            value="no data file" if path.is_dir() else f"the suffix {path.suffix or '(none)'}",
            rule="files are " + ", ".join(BUILDERS),
            remedy="convert the text, or point to another place",
        )
    filled = [p for p in files if p.stat().st_size > 0]
    if not filled:
        raise DataError(
            f"calibration data {path}",
            value=f"{len(files)} empty file(s)",
            rule="at least one document is needed",
            remedy="point to files that hold text",
        )
    return filled


def describe(error: BaseException) -> str:
    """Return a library's exception as one short line for a message of ours."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else "no rows"


def _looks_like_a_path(path: str) -> bool:
    """Whether a name that does not exist was meant as a path, not as `owner/dataset`."""
    return (
        path.startswith(("/", ".", "~"))
        or path.count("/") > 1
        or path.endswith("/")
        or Path(path).suffix.lower() in BUILDERS
    )


def _refuse_name(source: DataSource) -> None:
    if source.name is not None:
        raise ConfigError(
            f"name of data source {source.path}",
            value=source.name,
            rule="a name selects a subset of a hub dataset; files and demo have none",
            remedy="leave it out",
        )


def _read_demo(source: DataSource, seed: Sequence[int]) -> Iterator[Document]:
    import numpy as np  # here, so that reading a configuration stays quick

    from pipeline.demo import text

    _refuse_name(source)
    if source.split not in list(text.Split):
        raise ConfigError(
            "split of data source demo",
            value=source.split,
            rule="the built-in text has the splits " + ", ".join(text.Split),
            remedy="use split: calibration",
        )
    documents = text.read_documents(text.Split(source.split))
    for index in np.random.default_rng(list(seed)).permutation(len(documents)):
        yield documents[index].text


def _read_files(source: DataSource, path: Path, seed: Sequence[int]) -> Iterator[Document]:
    """Shuffle the rows of all files of all kinds as one, and read them one by one."""
    import numpy as np

    _refuse_name(source)
    files = list_files(path)
    tables = []
    for builder in sorted({BUILDERS[file.suffix.lower()] for file in files}):
        chosen = [file for file in files if BUILDERS[file.suffix.lower()] == builder]
        table = _load_table(source, builder, chosen)
        column = _choose_column(source, table.column_names)
        tables.append((table.select_columns([column]), column))
    starts = np.cumsum([0] + [len(table) for table, _ in tables])
    order = np.random.default_rng(list(seed)).permutation(int(starts[-1]))
    for row in order:
        which = int(np.searchsorted(starts, row, side="right")) - 1
        table, column = tables[which]
        try:
            value = table[int(row - starts[which])][column]
        except (ValueError, OSError, OverflowError) as error:  # Arrow's are ValueErrors
            raise DataError(
                f"row {row} of calibration data {source.path}",
                value=describe(error),
                rule="every row must be readable",
                remedy="mend the file",
            ) from error
        yield _check_row(source, column, value)


def _load_table(source: DataSource, builder: str, files: list[Path]) -> Any:
    """Load files of one kind as one `datasets.Dataset` (memory-mapped)."""
    import datasets

    if builder == "json":
        for file in files:
            refuse_hostile_json(file)
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        with _quiet_progress():
            return datasets.load_dataset(
                builder,
                data_files={"train": [str(file.resolve()) for file in files]},
                split=source.split,
                **options,
            )
    except (
        datasets.exceptions.DatasetsError,
        ValueError,
        OSError,
        StopIteration,
        OverflowError,
        RecursionError,
        TypeError,  # columns of several types, seen after the first block
        AttributeError,
        KeyError,
    ) as error:
        if builder == "json":
            for file in files:
                find_broken_line(file)
        cause = error.__cause__ or error
        raise DataError(
            f"calibration data {source.path} ({len(files)} {builder} file(s), {files[0].name}"
            f"{' ...' if len(files) > 1 else ''})",
            value=describe(cause),
            rule="the files are read by the datasets library; all of one kind have the same "
            "columns, and their only split is train (slices: train[:1000])",
            remedy="mend the file, or give files of different columns as sources of their own",
        ) from error


def _read_hub(source: DataSource, seed: Sequence[int]) -> Iterator[Document]:
    """Stream a hub dataset (or its offline cache), shuffled within a buffer."""
    import datasets
    import numpy as np

    try:
        stream = datasets.load_dataset(source.path, source.name, split=source.split, streaming=True)
        columns = stream.column_names or list(next(iter(stream), {}))
        column = _choose_column(source, columns)
        number = int(np.random.default_rng(list(seed)).integers(2**31))
        shuffled = stream.shuffle(seed=number, buffer_size=HUB_SHUFFLE_DOCUMENTS)
        for row in shuffled:
            yield _check_row(source, column, row[column])
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError) as error:
        unreached = isinstance(error, ConnectionError) or "offline" in str(error).lower()
        raise DataError(
            f"calibration data {source.path} (not a file here, so taken as a hub dataset)",
            value=describe(error),
            rule="this machine is offline or cannot reach the hub, and its cache lacks the dataset"
            if unreached
            else "the datasets library must be able to load it (no remote code is ever run)",
            remedy="fetch it where there is a network (hf download --repo-type dataset "
            f"{source.path} --local-dir DIR) and give DIR as the path, or use another local "
            "file, or path=demo"
            if unreached
            else "check its path, name (subset) and split, and that you have access",
        ) from error


def _choose_column(source: DataSource, columns: Sequence[str]) -> str:
    for column in COLUMNS:
        if column in columns:
            return column
    raise DataError(
        f"calibration data {source.path}",
        value="the columns " + (", ".join(columns) or "(none)"),
        rule="text is read from a column named text, conversations from one named messages",
        remedy="rename the column that holds the text",
    )


def _check_row(source: DataSource, column: str, row: Any) -> Any:
    """Return a row's document; its absent (null) message fields are dropped."""
    if row is None or (column == "text" and isinstance(row, str)):
        return row
    if column == "messages" and isinstance(row, list):
        if all(isinstance(message, dict) for message in row):
            return [{k: v for k, v in message.items() if v is not None} for message in row]
        row = next(message for message in row if not isinstance(message, dict))
    raise DataError(
        f"column {column} of calibration data {source.path}",
        value=f"a {type(row).__name__}: {str(row)[:60]!r}",
        rule="text is a string, messages a list of objects with role and content",
        remedy="mend that row",
    )


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Keep the progress bars of `datasets` out of the log of every rank."""
    import datasets

    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
