"""The text that runs through the layers: what scales come from, and what they are measured on.

In: the options and the source. Out: token ids of both, which are refused where half of
the evaluation's text was calibrated on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.calibration.data import check_token_ids, load_and_hold_out
from pipeline.calibration.token_file import is_token_file, load_token_file
from pipeline.checkpoint.source import FileSource, Source
from pipeline.checkpoint.synthetic import SyntheticSource, random_token_ids
from pipeline.config import CalibrateConfig, data_sources
from pipeline.errors import DataError

logger = logging.getLogger(__name__)

RUN = 16
WARN_SHARED, MOST_SHARED = 0.05, 0.5
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, and its bits look random


class TokenIds(NamedTuple):
    """What runs through the layers, int64 [sequences, seq_len] each.

    Attributes:
        calibration: What the scales come from.
        evaluation: What the quantized model is measured on; may have no sequence.
    """

    calibration: torch.Tensor
    evaluation: torch.Tensor


def load_tokens(
    config: CalibrateConfig, conf_dir: Path, source: Source, vocab_size: int
) -> TokenIds:
    """Token ids, checked against the vocabulary.

    Args:
        config: Which text, and how much of it.
        conf_dir: Directory of the presets.
        source: The checkpoint, whose tokenizer reads the text; made-up weights read random ids.
        vocab_size: Of the model.

    Raises:
        DataError: Unreadable, too little, or ids that the model does not have.
    """
    wanted = config.evaluation.num_sequences if config.evaluation.data is None else 0
    tokens = _load(
        config, conf_dir, source, vocab_size, config.data, config.calibration.num_sequences, wanted
    )
    if config.evaluation.num_sequences and config.evaluation.data is not None:
        count = config.evaluation.num_sequences
        # Whatever the calibration's seed: runs that differ in it are measured on the same text.
        others = _load(
            config, conf_dir, source, vocab_size, config.evaluation.data, count, 0, seed=0
        )
        tokens = TokenIds(tokens.calibration, others.calibration)
    if len(tokens.evaluation) and not (isinstance(source, SyntheticSource) and config.data is None):
        _check_overlap(tokens, config)
    for ids in tokens:
        if len(ids):
            check_token_ids(ids, vocab_size)
    return tokens


def shared_runs(calibration: torch.Tensor, evaluation: torch.Tensor) -> float:
    """Share of the evaluation's runs of 16 tokens that also occur in the calibration text."""
    size = min(RUN, calibration.shape[1], evaluation.shape[1])
    known, found = (_hashes(ids, size) for ids in (calibration, evaluation))
    # Most of the calibration's runs are told apart by 24 bits; sorting all of them takes seconds.
    is_near = np.zeros(2**24, dtype=bool)
    is_near[found >> np.uint64(40)] = True
    near = known[is_near[known >> np.uint64(40)]]
    return float(np.isin(found, near).mean()) if found.size else 0.0


def _hashes(ids: torch.Tensor, size: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit polynomial of every run within a sequence; equal runs have equal ones."""
    values = ids.numpy().astype(np.uint64)
    runs = values.shape[1] - size + 1
    hashes = np.zeros((len(values), runs), dtype=np.uint64)
    for start in range(size):  # wraps around at 2**64
        hashes = hashes * _FACTOR + values[:, start : start + runs] + np.uint64(1)
    return hashes.ravel()


def _check_overlap(tokens: TokenIds, config: CalibrateConfig) -> None:
    """What was calibrated on says too little about what quantization costs.

    Raises:
        DataError: Half of the evaluation text or more is in both.
    """
    share = shared_runs(tokens.calibration, tokens.evaluation)
    name = "data" if config.evaluation.data is None else "evaluation.data"
    told = f"{share:.0%} of the evaluation text (by runs of {RUN} tokens) is calibrated on"
    if share >= MOST_SHARED:
        raise DataError(
            f"{name}={(config.evaluation if '.' in name else config).data}",
            value=told,
            rule="the evaluation needs text of its own",
            remedy="name other text as evaluation.data, or leave it out: it is then what follows "
            "the calibration text in data; remove what stands there several times",
        )
    if share >= WARN_SHARED:
        logger.warning("%s: %s; the figures may be too good", name, told)


def _load(
    config: CalibrateConfig,
    conf_dir: Path,
    source: Source,
    vocab_size: int,
    data: Any,
    count: int,
    held_out: int,
    seed: int | None = None,
) -> TokenIds:
    size = config.calibration
    seed = size.seed if seed is None else seed
    if isinstance(source, SyntheticSource) and data is None:
        return TokenIds(
            *(
                random_token_ids(vocab_size, number, size.seq_len, seed=part)
                for number, part in ((count, seed), (held_out, seed + 1))
            )
        )
    if isinstance(data, str) and is_token_file(data):
        ids = load_token_file(data, count + held_out, size.seq_len)
        return TokenIds(ids[:count], ids[count:])
    assert isinstance(source, FileSource), "the options allow no text without a tokenizer"
    return TokenIds(
        *load_and_hold_out(
            data_sources(data, conf_dir / "data"),
            source.directory,
            num_sequences=count,
            held_out=held_out,
            seq_len=size.seq_len,
            seed=seed,
        )
    )
