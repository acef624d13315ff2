"""The demo: a tiny trained Nemotron-H, the text it was trained on and the script that trained it.

Nothing here is used by the conversion itself. `text` lists the Python standard library's own source
files in three disjoint parts, `tokenizer` makes the byte-level tokenizer, `model` is the training
model, `checkpoint` writes and reads it in NVIDIA's naming, `evaluate` measures it, `train` is the
script. The shipped checkpoint lies in the directory `model` beside these files.
"""

from pathlib import Path


def demo_checkpoint_dir() -> Path:
    """The directory of the shipped demo checkpoint."""
    return Path(__file__).parent / "model"


__all__ = ["demo_checkpoint_dir"]
