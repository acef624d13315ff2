"""The next-token loss of the BF16 model on a sample of the calibration text.

In: hidden states after the last layer, the final norm and the head. Out: nats per token of the
model, and of token frequencies alone. A tensor that was mapped wrongly would otherwise pass
unseen: a model that does worse than frequencies has not been read right, or is not trained.
"""

from __future__ import annotations

import math

import torch

from pipeline.calibration.hidden import HiddenStore
from pipeline.errors import NumericsError
from pipeline.runtime.collectives import Ranks, reduce_sum

VOCAB_ROWS = 16384


def next_token_loss(
    store: HiddenStore,
    norm_weight: torch.Tensor,
    head_weight: torch.Tensor,
    epsilon: float,
    *,
    sequences: int,
    ranks: Ranks,
) -> float:
    """Mean cross entropy in nats per token over the first `sequences` calibration sequences.

    Args:
        store: After the last layer.
        norm_weight: Final RMSNorm, [hidden].
        head_weight: [vocab, hidden]; the embedding where they are tied.
        epsilon: Of the norm.
        sequences: Size of the sample.
        ranks: All ranks add up their parts.
    """
    total = torch.zeros(2, dtype=torch.float64)
    norm_weight, head = norm_weight.to(ranks.device), head_weight.to(ranks.device)
    for batch in store.batches:
        if min(batch.sequences) >= sequences:
            continue
        states = store.on_device(batch)
        for column, index in enumerate(batch.sequences):
            if index >= sequences or float(batch.weights[column]) == 0.0:
                continue
            targets = store.token_ids[index].roll(-1)[store.positions]
            known = torch.ones(len(targets), dtype=torch.bool)
            known[-1] = store.positions.stop < store.token_ids.shape[1]
            hidden = _rms_norm(states[:, column], norm_weight, epsilon)
            losses = _cross_entropy(hidden, head, targets.to(ranks.device)).cpu()
            total += torch.stack([losses[known].double().sum(), known.sum().double()])
    summed, count = reduce_sum(total.to(ranks.device), ranks.world).tolist()
    return float(summed / count)


def unigram_loss(token_ids: torch.Tensor, vocab_size: int, sequences: int) -> float:
    """Loss of the calibration set's token frequencies on the same sample (add-one smoothing)."""
    counts = torch.bincount(token_ids.flatten(), minlength=vocab_size).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return float(-log_probabilities[token_ids[:sequences, 1:]].mean())


def refuse_nonfinite_loss(loss: float) -> None:
    """Refuses a loss that is no number.

    Raises:
        NumericsError: NaN or Inf: hidden states, the final norm or the head overflowed.
    """
    if not math.isfinite(loss):
        raise NumericsError(
            "BF16 next-token loss on the calibration text",
            value=loss,
            rule="must be finite: the last layer's output, backbone.norm_f or the head hold NaN "
            "or Inf",
            remedy="check those source tensors; with compute_dtype=bfloat16 try float32",
        )


def check_loss(loss: float, of_unigrams: float, *, allow_bad_loss: bool) -> None:
    """Refuses a model that predicts worse than token frequencies do.

    Raises:
        NumericsError: Unless `allow_bad_loss`; NaN is never allowed.
    """
    if loss <= of_unigrams or (allow_bad_loss and loss == loss):
        return
    raise NumericsError(
        "BF16 next-token loss on the calibration text",
        value=f"{loss:.3f} nats per token",
        rule=f"must not be worse than that of token frequencies alone ({of_unigrams:.3f}): "
        "a tensor is mapped wrongly, the tokenizer belongs to another model, "
        "or the model is not trained",
        remedy="check config.json and tokenizer; allow_bad_loss=true publishes all the same "
        "(finished layers are kept)",
    )


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def _cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss per position [positions]; the vocabulary passes in chunks, never all logits at once."""
    parts = []
    right = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, head.shape[0], VOCAB_ROWS):
        logits = hidden @ head[start : start + VOCAB_ROWS].float().T
        parts.append(logits.logsumexp(-1))
        inside = (targets >= start) & (targets < start + logits.shape[1])
        right[inside] = logits[inside].gather(1, (targets[inside] - start)[:, None])[:, 0]
    return torch.stack(parts).logsumexp(0) - right
