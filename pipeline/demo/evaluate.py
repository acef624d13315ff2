"""What the demo model reaches on held-out text, against a byte trigram model.

Goes in: a model in fp32, its tokenizer and the evaluation files. Comes out: bits per byte of both
models on the same files, the share of tokens that uses each expert, and the loss of the
multi-token-prediction block.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.demo.model import DemoModel
from pipeline.demo.text import Split, read_documents
from pipeline.demo.tokenizer import BOS

WINDOW_TOKENS = 256
BATCH = 16


@dataclass(frozen=True)
class ModelFigures:
    """What one pass over some text measured."""

    bits_per_byte: float
    mtp_bits_per_token: float  # of token t+2, from the multi-token-prediction block
    bits_per_token: float
    mtp_accuracy: float  # share of tokens t+2 that the block ranks first
    text_bytes: int
    tokens: int
    expert_share: dict[str, list[float]]  # per MoE layer: share of tokens that uses each expert


@dataclass(frozen=True)
class Figures(ModelFigures):
    """The same with the baseline's bits per byte on the same text."""

    trigram_bits_per_byte: float
    evaluation_files: int


def measure_model(
    model: DemoModel, tokenizer: Tokenizer, texts: Sequence[str], window: int = WINDOW_TOKENS
) -> ModelFigures:
    """Run the model over whole texts; every token is predicted once.

    Each text is cut into windows of `window` tokens that the model sees one by one, without what
    came before: the first token of a text is predicted from `<s>`, the first of a later window
    from the one token before it.
    """
    for router in model.routers().values():
        router.tokens_E.zero_()
    vocab_size = model.config.vocab_size
    nats = mtp_nats = 0.0
    tokens = mtp_tokens = mtp_hits = 0
    for ids, targets in _batches(tokenizer, texts, window):
        with torch.no_grad():
            if ids.shape[1] > 1:
                logits, ahead = model.forward_with_mtp(ids)
            else:  # one token has no token after the next
                logits, ahead = model(ids), model.lm_head.weight.new_empty(1, 0, vocab_size)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        later = targets[:, 1:]
        mtp_nats += F.cross_entropy(ahead.flatten(0, 1), later.flatten(), reduction="sum").item()
        mtp_hits += int((ahead.argmax(-1) == later).sum())
        tokens += targets.numel()
        mtp_tokens += later.numel()
    shares = {}
    for name, router in model.routers().items():
        routed_tokens = int(router.tokens_E.sum()) // model.config.num_experts_per_tok
        shares[name] = (router.tokens_E.double() / routed_tokens).tolist()
    text_bytes = sum(len(text.encode()) for text in texts)
    return ModelFigures(
        bits_per_byte=nats / math.log(2) / text_bytes,
        bits_per_token=nats / math.log(2) / tokens,
        mtp_bits_per_token=mtp_nats / math.log(2) / mtp_tokens,
        mtp_accuracy=mtp_hits / mtp_tokens,
        text_bytes=text_bytes,
        tokens=tokens,
        expert_share=shares,
    )


def evaluate(model: DemoModel, tokenizer: Tokenizer) -> Figures:
    """All figures on the whole evaluation part, the trigram model trained on the training part."""
    texts = [document.text for document in read_documents(Split.evaluation)]
    trigram = ByteTrigram([document.text for document in read_documents(Split.train)])
    return Figures(
        **vars(measure_model(model, tokenizer, texts)),
        trigram_bits_per_byte=trigram.bits_per_byte(texts),
        evaluation_files=len(texts),
    )


class ByteTrigram:
    """Byte trigram model with interpolated Witten-Bell smoothing.

    p(c | h) = (n(h c) + t(h) p(c | shorter h)) / (n(h) + t(h)), where t(h) counts the different
    bytes seen after h (Witten & Bell 1991); below the unigram stands 1/256. Every text starts after
    two zero bytes.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        codes = torch.cat([_trigram_codes(text) for text in texts])
        probability = torch.full((1, 256), 1 / 256, dtype=torch.float64)
        for order in (1, 2, 3):
            counts = torch.bincount(codes % 256**order, minlength=256**order).view(-1, 256)
            seen = counts.sum(1, keepdim=True)
            kinds = (counts > 0).sum(1, keepdim=True)
            backoff = probability.repeat(len(counts) // len(probability), 1)
            smoothed = (counts + kinds * backoff) / (seen + kinds).clamp(min=1)
            probability = torch.where(seen > 0, smoothed, backoff)
        self._bits = -probability.flatten().log2()

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """Mean code length over the bytes of all texts."""
        codes = torch.cat([_trigram_codes(text) for text in texts])
        return self._bits[codes].mean().item()


def _trigram_codes(text: str) -> Tensor:
    """Each byte with the two before it as one number (oldest first): int64 [bytes]."""
    data = torch.frombuffer(bytearray(b"\0\0" + text.encode()), dtype=torch.uint8).long()
    return (data[:-2] * 256 + data[1:-1]) * 256 + data[2:]


def _batches(
    tokenizer: Tokenizer, texts: Sequence[str], window: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of equal length, stacked: ids and targets, both [B, window or less].

    Only whole windows share a batch and a text's last window goes alone, so that no padding ever
    reaches a router.
    """
    bos = tokenizer.token_to_id(BOS)
    whole: list[Tensor] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        stream = torch.tensor([bos, *encoding.ids])
        for start in range(0, len(stream) - 1, window):
            part = stream[start : start + window + 1]
            if len(part) <= window:
                yield part[None, :-1], part[None, 1:]
            else:
                whole.append(part)
            if len(whole) == BATCH:
                stacked = torch.stack(whole)
                yield stacked[:, :-1], stacked[:, 1:]
                whole = []
    if whole:
        stacked = torch.stack(whole)
        yield stacked[:, :-1], stacked[:, 1:]
