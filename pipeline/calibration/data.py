"""Calibration data: text from several sources, packed into full token sequences.

In: sources with weights, a tokenizer directory, how many sequences of which length, a seed.
Out: one int64 tensor [num_sequences, seq_len]. It depends on these alone, never on the number of
ranks: every rank may load it, or one may and send it to the others.

Documents are shuffled within their source, separated by the tokenizer's end-of-text token (where
it has one) and cut into sequences without padding. Tokenizing stops as soon as there are enough.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.calibration.documents import DataSource, Document, describe, read_documents
from pipeline.errors import ConfigError, DataError

__all__ = ["DataSource", "check_token_ids", "load_and_hold_out", "load_sequences", "share_out"]

logger = logging.getLogger(__name__)

PIECES_PER_BATCH = 16
# Longer documents are tokenized in pieces of this many characters.
PIECE_CHARACTERS = 1_000_000


def load_sequences(
    sources: list[DataSource],
    tokenizer_dir: Path,
    *,
    num_sequences: int,
    seq_len: int,
    seed: int,
) -> torch.Tensor:
    """Return the calibration sequences, int64 [num_sequences, seq_len], sources mixed by weight.

    Raises:
        ConfigError: A number out of range, no source, or a source too light to get a sequence.
        DataError: A source or the tokenizer cannot be read, or a source holds too little text.
    """
    chosen, _ = load_and_hold_out(
        sources,
        tokenizer_dir,
        num_sequences=num_sequences,
        held_out=0,
        seq_len=seq_len,
        seed=seed,
    )
    return chosen


def load_and_hold_out(
    sources: list[DataSource],
    tokenizer_dir: Path,
    *,
    num_sequences: int,
    held_out: int,
    seq_len: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `load_sequences` does, and other sequences beside it.

    Args:
        sources: Where the text comes from.
        tokenizer_dir: The checkpoint.
        num_sequences: How many are for calibration.
        held_out: How many more, of the text that follows in each source; the calibration sequences
            do not depend on it.
        seq_len: Tokens of each.
        seed: Order of documents and sequences.

    Returns:
        int64 [num_sequences, seq_len] and int64 [held_out, seq_len].

    Raises:
        ConfigError: A number out of range, no source, or a source too light to get a sequence.
        DataError: A source or the tokenizer cannot be read, or a source holds too little text.
    """
    _check_numbers(num_sequences, seq_len, seed)
    counts = share_out(sources, num_sequences)
    more = share_out(sources, held_out, least=0)
    tokenizer = _load_tokenizer(tokenizer_dir)
    parts, others = [], []
    for index, (source, count) in enumerate(zip(sources, counts, strict=True)):
        documents = read_documents(source, (seed, index))
        packed = _pack(source, documents, tokenizer, count + more[index], seq_len)
        parts.append(packed[:count])
        others.append(packed[count:])
        logger.info("calibration data %s: %d sequences of %d tokens", source.path, count, seq_len)
    order = np.random.default_rng([seed, len(sources)]).permutation(num_sequences)
    calibration, evaluation = np.concatenate(parts)[order], np.concatenate(others)
    return torch.from_numpy(calibration), torch.from_numpy(evaluation)


def share_out(sources: list[DataSource], num_sequences: int, *, least: int = 1) -> list[int]:
    """Return how many sequences each source gives: weights normalised, largest remainders first.

    Args:
        sources: With their weights.
        num_sequences: To be shared.
        least: What no source may stay below.

    Raises:
        ConfigError: No source, or a source whose weight is too small for a single sequence.
    """
    if not sources:
        raise ConfigError(
            "data.sources",
            value="none",
            rule="calibration needs at least one source of text",
            remedy="name a file, a directory, a hub dataset or demo",
        )
    total = sum(source.weight for source in sources)
    quotas = [num_sequences * source.weight / total for source in sources]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(sources)), key=lambda i: (counts[i] - quotas[i], i))
    for index in by_remainder[: num_sequences - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if count < least:
            raise ConfigError(
                f"weight of data source {source.path}",
                value=f"{source.weight} of {total}, no sequence of {num_sequences}",
                rule="every source gives at least one sequence",
                remedy="raise its weight or num_sequences, or leave it out",
            )
    return counts


def check_token_ids(sequences: torch.Tensor, vocab_size: int) -> None:
    """Refuse token ids that the model's embedding does not have.

    Raises:
        DataError: An id is negative, or not below `vocab_size`.
    """
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            "token ids of the calibration data",
            value=f"{low} to {high}",
            rule=f"the model's vocabulary has ids 0 to {vocab_size - 1}",
            remedy="use the tokenizer that belongs to the checkpoint",
        )


def _check_numbers(num_sequences: int, seq_len: int, seed: int) -> None:
    for what, value, least in (
        ("num_sequences", num_sequences, 1),
        ("seq_len", seq_len, 2),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(
                f"data.{what}",
                value=value,
                rule=f"it is at least {least}",
                remedy=f"set data.{what} to {least} or more",
            )


def _load_tokenizer(tokenizer_dir: Path) -> Any:
    """Load the checkpoint's tokenizer from its directory alone, without remote code."""
    # Imported here: it takes seconds, and nothing else in this module needs it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(tokenizer_dir), local_files_only=True, trust_remote_code=False
        )
    # What a broken tokenizer.json raises is up to the Rust library: a bare Exception.
    except Exception as error:
        raise DataError(
            f"tokenizer in {tokenizer_dir}",
            value=describe(error),
            rule="calibration text is tokenized with the tokenizer of the checkpoint",
            remedy="put its tokenizer.json and tokenizer_config.json there",
        ) from error


def _pack(
    source: DataSource,
    documents: Iterator[Document],
    tokenizer: Any,
    num_sequences: int,
    seq_len: int,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Fill int64 [num_sequences, seq_len] from the start of the token stream of `documents`."""
    needed, have = num_sequences * seq_len, 0
    tokens = np.empty(needed, dtype=np.int64)
    for ids in _tokenize(source, documents, tokenizer):
        taken = min(len(ids), needed - have)
        tokens[have : have + taken] = ids[:taken]
        have += taken
        if have == needed:
            return tokens.reshape(num_sequences, seq_len)
    fits = have // seq_len
    raise DataError(
        f"calibration data {source.path} (split {source.split})",
        value=f"{have} tokens",
        rule=f"{num_sequences} sequences of {seq_len} tokens need {needed}; "
        f"{fits} sequence{'' if fits == 1 else 's'} would fit",
        remedy="add text, lower calibration.num_sequences, evaluation.num_sequences (0 leaves the "
        "evaluation out) or seq_len, or lower this source's weight",
    )


def _tokenize(
    source: DataSource, documents: Iterator[Document], tokenizer: Any
) -> Iterator[list[int]]:
    """Yield token ids, each document's closed by the end-of-text token if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = (
        (piece, is_last)
        for document in documents
        for piece, is_last in _cut(_render(source, document, tokenizer))
    )
    for batch in batched(pieces, PIECES_PER_BATCH):
        for ids, (_, is_last) in zip(_encode(source, batch, tokenizer), batch, strict=True):
            yield ids + end if is_last else ids


def _encode(
    source: DataSource, pieces: Sequence[tuple[str, bool]], tokenizer: Any
) -> list[list[int]]:
    """Return the token ids of each piece."""
    try:
        texts = [text for text, _ in pieces]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return list(found)
    # Text that is not UTF-8 (half of a surrogate pair) is a TypeError of the Rust library, and a
    # tokenizer that contradicts itself whatever it likes.
    except Exception as error:
        raise DataError(
            f"tokenizing calibration data {source.path}",
            value=describe(error),
            rule="the tokenizer of the checkpoint must take the text",
            remedy="mend the text, or the tokenizer.json of the checkpoint",
        ) from error


def _render(source: DataSource, document: Document, tokenizer: Any) -> str:
    """Return a document's text; conversations go through the tokenizer's chat template."""
    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        raise DataError(
            f"calibration data {source.path}",
            value="a messages column",
            rule="conversations need a chat template, and the checkpoint's tokenizer has none",
            remedy="give the conversations as plain text in a text column, or put the model's "
            "chat_template.jinja beside its tokenizer",
        )
    try:
        return str(tokenizer.apply_chat_template(document, tokenize=False))
    # A template is a program of the checkpoint's (run in jinja's sandbox): it may raise anything.
    except Exception as error:
        roles = ", ".join(str(message.get("role")) for message in document)
        raise DataError(
            f"a conversation of calibration data {source.path} with the roles {roles}",
            value=describe(error),
            rule="the tokenizer's chat template must accept it",
            remedy="mend or remove that conversation",
        ) from error


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a very long text at line ends where there are any; yield pieces, and which is the last.

    One by one: a book-sized file is not tokenized whole for a few sequences.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = text.rfind("\n", begin, begin + PIECE_CHARACTERS) + 1 or begin + PIECE_CHARACTERS
        yield text[begin:end], False
        begin = end
    yield text[begin:], True
