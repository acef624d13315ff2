"""The text that runs through the layers: what scales come from, and what they are measured on.

In: the options and the source. Out: token ids of both, no sequence in common unless the user names
the same text twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.calibration.data import check_token_ids, load_and_hold_out
from pipeline.calibration.token_file import is_token_file, load_token_file
from pipeline.checkpoint.source import FileSource, Source
from pipeline.checkpoint.synthetic import SyntheticSource, random_token_ids
from pipeline.config import CalibrateConfig, data_sources
from pipeline.errors import DataError


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
        _refuse_overlap(tokens, config)
    for ids in tokens:
        if len(ids):
            check_token_ids(ids, vocab_size)
    return tokens


def _refuse_overlap(tokens: TokenIds, config: CalibrateConfig) -> None:
    """What was calibrated on says too little about what quantization costs.

    Raises:
        DataError: A sequence is in both.
    """
    known = {row.numpy().tobytes() for row in tokens.calibration}
    both = sum(row.numpy().tobytes() in known for row in tokens.evaluation)
    if both:
        raise DataError(
            f"evaluation.data={config.evaluation.data}",
            value=f"{both} of {len(tokens.evaluation)} sequences are calibrated on",
            rule="the evaluation needs text of its own",
            remedy="name other text, or leave evaluation.data out: it is then what follows the "
            "calibration text in data",
        )


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
