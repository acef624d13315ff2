"""The demo's model card: `training.json` (figures) and `README.md` (the same for a reader)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.demo.evaluate import Figures


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """How a checkpoint was trained."""

    python: str
    torch: str
    processor: str
    threads: int
    seed: int
    steps: int
    minutes: float
    batch: int
    length: int
    learning_rate: float
    parameters: int
    training_tokens: int
    training_text_tokens: int


def write_card(directory: Path, training: TrainingRun, figures: Figures) -> None:
    """Write both files into the checkpoint directory."""
    content = {"training": asdict(training), "evaluation": asdict(figures)}
    (directory / "training.json").write_text(json.dumps(content, indent=2) + "\n")
    (directory / "README.md").write_text(_card(training, figures))


def _card(training: TrainingRun, figures: Figures) -> str:
    """The README: what the model is, what it reached, how it was made, what it is not for."""
    shares = [share for layer in figures.expert_share.values() for share in layer]
    rows = "\n".join(
        f"| `{name}` | {100 * min(layer):.1f} % | {100 * max(layer):.1f} % |"
        for name, layer in figures.expert_share.items()
    )
    return f"""# The demo model

A Nemotron-H of {training.parameters / 1e6:.2f} M parameters (Mamba-2, attention, latent mixture of
experts with a shared expert, one multi-token-prediction block), trained on the source of the Python
standard library. It exists so that calibration, conversion and audit can be shown on a model that
has learned something. It completes Python badly and has no other use.

## What it reached

Measured on the written BF16 checkpoint (computed in fp32) over {figures.evaluation_files} held-out
files, {figures.text_bytes:,} bytes, {figures.tokens:,} tokens, in windows of 256 tokens:

| model | bits per byte |
| --- | --- |
| this model | **{figures.bits_per_byte:.4f}** |
| byte trigram | {figures.trigram_bits_per_byte:.4f} |

The trigram model (interpolated Witten-Bell smoothing) was trained on the same training files.
In bits per token this model has {figures.bits_per_token:.4f}. The multi-token-prediction block was
trained too: {figures.mtp_bits_per_token:.4f} bits per token for the token after the next, which it
ranks first {100 * figures.mtp_accuracy:.1f} % of the time.

Each token uses 4 of 16 experts, so an even share is 25 % of the tokens. The least used expert of
any layer is used by {100 * min(shares):.1f} % of the tokens:

| MoE layer | least used expert | most used expert |
| --- | --- | --- |
{rows}

## How it was made

`python -m pipeline.demo.train`: {training.steps:,} steps of {training.batch} sequences of
{training.length} tokens ({training.training_tokens / 1e6:.2f} M tokens; the training text has
{training.training_text_tokens / 1e6:.2f} M), {training.minutes} minutes with {training.threads}
threads of an {training.processor}; AdamW, peak learning rate {training.learning_rate}, cosine; seed
{training.seed}; Python {training.python}, torch {training.torch}. Experts are balanced by the
router's bias alone. All figures: `training.json`.

Text: the standard library's `.py` files (without its tests, IDLE, codecs' tables and documentation
strings), split by a hash of the path into training, calibration and evaluation files
(`pipeline/demo/text.py`). The tokenizer is byte-level BPE with every byte in its vocabulary.
The text is under the Python Software Foundation License.
"""
