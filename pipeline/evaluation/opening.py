"""Everything that an evaluation opens and refuses before the ranks connect.

In: an `EvaluateConfig` and this process's place. Out: both checkpoints, opened and compared by
their headers and configs, the rank grid, device and dtype; and the text. Read are headers, scales,
the tensors that both models share, and the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.architecture import Architecture, TensorSpec, expected_tensors
from pipeline.calibration.data import check_token_ids, load_and_hold_out, load_sequences
from pipeline.calibration.token_file import is_token_file, load_token_file
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.checkpoint.source_check import check_source
from pipeline.config import data_sources
from pipeline.config_evaluate import EvaluateConfig
from pipeline.devices import choose_device, choose_dtype
from pipeline.errors import ConfigError, LayoutError, OutputError, SourceError
from pipeline.evaluation.quantized import QuantizedCheckpoint
from pipeline.job import StoredTensor
from pipeline.preparation import Place, stored_tensors
from pipeline.sharding import ParallelDims, check_layout


@dataclasses.dataclass(frozen=True)
class Opened:
    """Both checkpoints, and where they are read.

    Attributes:
        source: The BF16 checkpoint.
        stored: Its tensors by logical name.
        architecture: Of both.
        checkpoint: The quantized one.
        dims: The rank grid.
        device: Of this rank.
        dtype: Compute dtype.
    """

    source: FileSource
    stored: dict[str, StoredTensor]
    architecture: Architecture
    checkpoint: QuantizedCheckpoint
    dims: ParallelDims
    device: torch.device
    dtype: torch.dtype

    def read_source(self, spec: TensorSpec) -> torch.Tensor:
        """A whole tensor of the source."""
        return self.source.read(self.stored[spec.name].name)

    @property
    def backend(self) -> str:
        """Name of what quantizes and dequantizes."""
        return "triton" if self.device.type == "cuda" else "reference"


def open_both(config: EvaluateConfig, place: Place) -> Opened:
    """Opens both checkpoints, and refuses what cannot work.

    Raises:
        AuditError: The directory breaks a rule of the format.
        LayersweepError: Anything else that a user can cause.
    """
    directory = Path(config.directory or "")
    if not config.directory or not directory.is_dir():
        raise ConfigError(
            "directory",
            value=config.directory or "nothing",
            rule="must be an existing checkpoint directory",
            remedy="python -m launch.evaluate DIR source=DIR data=FILE",
        )
    device = choose_device(config.device, place.local_rank)
    source = open_source(config.source)
    architecture = Architecture.from_hf_config(source.config)
    stored = stored_tensors(source, check_source(source, architecture, cast=config.cast))
    dims = config.parallel.dims(place.world, architecture.n_routed_experts)
    for error in check_layout(architecture, dims):
        raise error
    if config.seq_len % dims.tp:
        raise LayoutError(
            "seq_len",
            value=config.seq_len,
            rule=f"sequence parallelism cuts it into tp={dims.tp} equal parts",
            remedy=f"a multiple of {dims.tp}",
        )
    checkpoint = QuantizedCheckpoint(directory, audited=place.rank == 0)
    checkpoint.check_architecture(architecture, source.location)
    checkpoint.check_layout(dims, place.rank)
    opened = Opened(
        source,
        stored,
        architecture,
        checkpoint,
        dims,
        device,
        choose_dtype(config.compute_dtype, device),
    )
    if place.rank == 0:
        _check_outer(opened)
        if config.report is not None:
            _make_directory(Path(config.report))
    return opened


def _check_outer(opened: Opened) -> None:
    """Embedding, final norm and head are shared by both models, so they must be the source's."""
    for spec in expected_tensors(opened.architecture):
        if spec.layer is not None:
            continue
        ours, theirs = opened.checkpoint.fetch(spec).weight, opened.read_source(spec)
        if not torch.equal(ours.to(theirs.dtype), theirs):
            raise SourceError(
                spec.name,
                value="other values than the source's",
                rule="embedding, final norm and head are never quantized",
                remedy="give source= the BF16 checkpoint that this directory was made from",
            )


def load_text(config: EvaluateConfig, conf_dir: Path, opened: Opened) -> torch.Tensor:
    """Token ids, int64 [num_sequences, seq_len], checked against the vocabulary."""
    count, skipped, text = config.evaluation.num_sequences, config.skip_sequences, config.text
    if isinstance(text, str) and is_token_file(text):
        ids = load_token_file(text, skipped + count, config.seq_len)[skipped:]
    else:
        sources, tokenizer = data_sources(text, conf_dir / "data"), opened.source.directory
        size = {"seq_len": config.seq_len, "seed": config.seed}
        if skipped:
            _, ids = load_and_hold_out(
                sources, tokenizer, num_sequences=skipped, held_out=count, **size
            )
        else:
            ids = load_sequences(sources, tokenizer, num_sequences=count, **size)
    check_token_ids(ids, opened.architecture.vocab_size)
    return ids


def describe_text(config: EvaluateConfig) -> str:
    """Where the text comes from, in words."""
    items: Sequence[Any] = config.text if isinstance(config.text, list) else [config.text]
    names = [
        f"{item['path']} ({item['split']})"
        if isinstance(item, dict) and "split" in item
        else str(item.get("path") if isinstance(item, dict) else item)
        for item in items
    ]
    skipped = f", after its first {config.skip_sequences}" if config.skip_sequences else ""
    return ", ".join(names) + skipped


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(
            f"report {directory}",
            value=problem.strerror,
            rule="must be a directory that can be written",
            remedy="choose another place",
        ) from problem
