"""Train the demo model: `python -m pipeline.demo.train --output DIR [--minutes N | --steps N]`.

Goes in: the standard library's training files. Comes out: a checkpoint directory in NVIDIA's naming
with tokenizer, model card (`README.md`) and figures (`training.json`), all measured on the written
BF16 checkpoint. Plain PyTorch on the CPU, seeded. With `--steps` a run can be repeated exactly
(same versions, same number of threads); with `--minutes` the learning rate follows the clock.
"""

import argparse
import logging
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.demo.card import TrainingRun, write_card
from pipeline.demo.checkpoint import MAX_POSITION_EMBEDDINGS, load_model, save_checkpoint
from pipeline.demo.evaluate import evaluate
from pipeline.demo.layers import DemoConfig
from pipeline.demo.model import DemoModel
from pipeline.demo.text import Document, Split, read_documents
from pipeline.demo.tokenizer import BOS, EOS, TURN_END, TURN_START, save_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

CHAT_EVERY = 16  # every sixteenth document is wrapped in the chat template
MTP_LOSS_WEIGHT = 0.2
BALANCE_RATE = 1e-3  # step of the router's bias, as in DeepSeek-V3 (arXiv 2412.19437)
WARMUP_SHARE = 0.03
FINAL_LR_SHARE = 0.02
GRADIENT_NORM = 1.0
SAVE_EVERY = 250


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a run may vary; one of `minutes` and `steps` ends it."""

    output: Path
    minutes: float | None
    steps: int | None
    batch: int
    length: int
    learning_rate: float
    seed: int
    threads: int


def encode_stream(documents: list[Document], tokenizer: Tokenizer) -> Tensor:
    """All documents as one int64 stream, each between `<s>` and `</s>`, some as a chat turn."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    texts = [
        f"{TURN_START}user\nShow me {document.path}.{TURN_END}\n"
        f"{TURN_START}assistant\n{document.text}{TURN_END}\n"
        if index % CHAT_EVERY == 0
        else document.text
        for index, document in enumerate(documents)
    ]
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream += [bos, *encoding.ids, eos]
    return torch.tensor(stream)


def sample_batch(stream: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random windows of the stream: [batch, length + 1]."""
    starts = torch.randint(len(stream) - length - 1, (batch, 1), generator=generator)
    return stream[starts + torch.arange(length + 1)]


def learning_rate_share(progress: float) -> float:
    """Linear warm-up, then a cosine down to FINAL_LR_SHARE; progress and result in 0..1."""
    if progress < WARMUP_SHARE:
        return max(progress / WARMUP_SHARE, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine


def training_loss(model: DemoModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of token t+1 and of token t+2 (the MTP block), in nats per token."""
    logits, ahead = model.forward_with_mtp(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return loss, F.cross_entropy(ahead.flatten(0, 1), ids[:, 2:].flatten())


def make_optimizer(model: DemoModel, learning_rate: float) -> torch.optim.AdamW:
    """AdamW; only matrices decay (not the embedding, the norms, the scan or the biases)."""
    decaying: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        decays = parameter.dim() >= 2 and "conv1d" not in name and "embeddings" not in name
        (decaying if decays else free).append(parameter)
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def train_model(model: DemoModel, stream: Tensor, options: TrainOptions) -> tuple[int, float]:
    """Train in place until the steps or the minutes are used; returns steps and seconds."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = make_optimizer(model, options.learning_rate)
    routers = list(model.routers().values())
    start, step, mean_loss = time.monotonic(), 0, 0.0
    while True:
        elapsed_s = time.monotonic() - start
        if options.steps is not None:
            progress = step / options.steps
        else:
            progress = elapsed_s / (60 * (options.minutes or 0))
        if progress >= 1:
            return step, elapsed_s
        share = learning_rate_share(progress)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * share
        loss, mtp_loss = training_loss(
            model, sample_batch(stream, options.batch, options.length, generator)
        )
        torch.autograd.backward(loss + MTP_LOSS_WEIGHT * mtp_loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for router in routers:
            router.balance(BALANCE_RATE * share)
        step += 1
        mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 50 == 0:
            logger.info(
                "step %d, %.0f %%, %.0f s: loss %.3f nats/token, MTP %.3f",
                step, 100 * progress, elapsed_s, mean_loss, mtp_loss.item(),
            )  # fmt: skip
        if step % SAVE_EVERY == 0:  # so that a run cut short leaves a model
            save_checkpoint(model, options.output)


def run(options: TrainOptions) -> None:
    """Tokenizer, training, checkpoint, measurement, model card."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = DemoConfig()
    documents = read_documents(Split.train)
    tokenizer = train_tokenizer((document.text for document in documents), config.vocab_size)
    save_tokenizer(tokenizer, options.output, MAX_POSITION_EMBEDDINGS)
    stream = encode_stream(documents, tokenizer)
    logger.info("%d training files, %d tokens", len(documents), len(stream))
    model = DemoModel(config)
    steps, seconds = train_model(model, stream, options)
    save_checkpoint(model, options.output)
    figures = evaluate(load_model(options.output), tokenizer)
    training = TrainingRun(
        python=platform.python_version(),
        torch=torch.__version__,
        processor=_processor(),
        threads=options.threads,
        seed=options.seed,
        steps=steps,
        minutes=round(seconds / 60, 1),
        batch=options.batch,
        length=options.length,
        learning_rate=options.learning_rate,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        training_tokens=steps * options.batch * options.length,
        training_text_tokens=len(stream),
    )
    write_card(options.output, training, figures)
    logger.info("%s: %.4f bits per byte", options.output, figures.bits_per_byte)


def _processor() -> str:
    """The processor's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo model on the standard library.")
    parser.add_argument("--output", type=Path, required=True)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="wall-clock time of the training (25)")
    length.add_argument("--steps", type=int, help="number of steps, for a repeatable run")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = vars(parser.parse_args())
    if arguments["minutes"] is None and arguments["steps"] is None:
        arguments["minutes"] = 25.0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(TrainOptions(**arguments))


if __name__ == "__main__":
    main()
