"""How far the quantized model's predictions are from the BF16 model's.

In: the streams after the last layer, final norm and head. Out: perplexity of both, KL of the BF16
model's next-token distribution to the quantized one's (nats per token), top-1 agreement. Logits
are computed in fp32 for some positions at a time and never kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from pipeline.calibration.hidden import HiddenStore
from pipeline.evaluation.records import Fidelity, ServingMode
from pipeline.evaluation.streams import Streams
from pipeline.runtime.collectives import Ranks, broadcast_object, gather_objects

_POSITIONS = 512
_VOCAB_ROWS = 16384


@dataclass(frozen=True)
class Head:
    """From hidden states to logits.

    Attributes:
        norm_weight: Final RMSNorm, [hidden].
        weight: [vocab, hidden]; the embedding where they are tied.
        epsilon: Of the norm.
    """

    norm_weight: torch.Tensor
    weight: torch.Tensor
    epsilon: float

    def to(self, device: torch.device) -> Head:
        """The same on a device."""
        return Head(self.norm_weight.to(device), self.weight.to(device), self.epsilon)

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [positions, vocab] of hidden states [positions, hidden]."""
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        x = x * self.norm_weight.float()
        logits = torch.empty(len(x), len(self.weight), dtype=torch.float32, device=x.device)
        for start in range(0, len(self.weight), _VOCAB_ROWS):
            rows = self.weight[start : start + _VOCAB_ROWS]
            logits[:, start : start + len(rows)] = _logits(x, rows)
        return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _logits(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """fp32 [positions, rows] of normed fp32 [positions, hidden] and rows of the head.

    On a GPU, BF16 rows are multiplied by two BF16 parts of each input, whose sum is off by at most
    2**-17 of it: tensor cores multiply these exactly and add them up in fp32.
    """
    if not (x.is_cuda and rows.dtype is torch.bfloat16):
        return x @ rows.float().T
    high = x.bfloat16()
    low = (x - high.float()).bfloat16()
    logits = torch.mm(high, rows.T, out_dtype=torch.float32)
    return logits.add_(torch.mm(low, rows.T, out_dtype=torch.float32))


@dataclass
class Divergence:
    """Per token, on the host: what one stream predicts against the BF16 stream.

    Attributes:
        losses: Cross entropy of the true next token under the stream, nats.
        kl: KL of the BF16 distribution to the stream's, nats.
        agrees: Whether both find the same token most likely.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """What the streams found at the end.

    Attributes:
        perplexity: Of the BF16 model.
        modes: Of the quantized one.
    """

    perplexity: float
    modes: list[Fidelity]


@torch.inference_mode()
def measure(streams: Streams, head: Head, ranks: Ranks) -> Measured:
    """Compares the streams; a collective, whose result is the same on every rank."""
    head = head.to(ranks.device)
    losses: list[torch.Tensor] = []
    found = {mode: Divergence() for mode in streams.modes}
    for number, batch in enumerate(streams.batches):
        for column, index in enumerate(batch.sequences):
            if float(batch.weights[column]) == 0.0:
                continue
            targets = next_tokens(streams.store, index)
            for start in range(0, len(targets), _POSITIONS):
                here = slice(start, min(start + _POSITIONS, len(targets)))
                wanted = targets[here].to(ranks.device)
                reference = head.log_probabilities(batch.hidden[here, column])
                losses.append(_losses(reference, wanted).cpu())
                for mode, divergence in found.items():
                    hidden = streams.served[mode][number][here, column]
                    compare(reference, head.log_probabilities(hidden), wanted, divergence)
    clipped = streams.clipped(ranks)
    parts = [_joined(losses), *(_joined(d.losses) for d in found.values())]
    parts += [_joined(d.kl) for d in found.values()]
    parts += [_joined(d.agrees) for d in found.values()]
    everyone = gather_objects(parts, ranks.world)
    measured = None
    if everyone:
        whole = [torch.cat(same).double() for same in zip(*everyone, strict=True)]
        measured = _summarize(whole, streams.modes, clipped)
    result = broadcast_object(measured, ranks.world)
    assert isinstance(result, Measured)
    return result


def next_tokens(store: HiddenStore, index: int) -> torch.Tensor:
    """The token after each of this rank's positions of a sequence; the very last has none."""
    positions = store.positions
    return store.token_ids[index][positions.start + 1 : positions.stop + 1]


def compare(
    reference: torch.Tensor, served: torch.Tensor, targets: torch.Tensor, into: Divergence
) -> None:
    """Adds what two sets of log probabilities [positions, vocab] say of each other."""
    into.losses.append(_losses(served, targets).cpu())
    into.agrees.append((reference.argmax(-1) == served.argmax(-1)).float().cpu())
    difference = served.neg_().add_(reference)
    into.kl.append(difference.mul_(reference.exp()).sum(-1).cpu())


def _losses(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(1, targets[:, None])[:, 0]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.empty(0)


def _summarize(
    whole: list[torch.Tensor], modes: tuple[ServingMode, ...], clipped: dict[ServingMode, float]
) -> Measured:
    count = len(modes)
    losses, kl, agrees = whole[1 : 1 + count], whole[1 + count : 1 + 2 * count], whole[-count:]
    return Measured(
        perplexity=_perplexity(whole[0]),
        modes=[
            Fidelity(
                mode=mode.value,
                perplexity=_perplexity(losses[i]),
                kl_mean=float(kl[i].mean()),
                kl_p99=_p99(kl[i]),
                top1=float(agrees[i].mean()),
                clipped=clipped[mode],
                predictions=len(kl[i]),
                kl_error=_standard_error(kl[i]),
                ratio_error=_ratio_error(losses[i] - whole[0]),
            )
            for i, mode in enumerate(modes)
        ],
    )


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _ratio_error(differences: torch.Tensor) -> float:
    """Of exp(mean), to first order."""
    return _perplexity(differences) * _standard_error(differences)


def _p99(values: torch.Tensor) -> float:
    """The least value that 99 % of them do not exceed."""
    return float(values.kthvalue(math.ceil(0.99 * len(values))).values)


def _perplexity(losses: torch.Tensor) -> float:
    """Infinite where a loss is beyond all bounds."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf
