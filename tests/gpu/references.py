"""Reference logits from the CPU, made in a process that cannot see mamba_ssm.

Where mamba_ssm is installed, transformers calls its GPU kernels for tensors on the CPU too, and
fails. `make_references(path)` runs this module as a program without it.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def make_references(path: Path) -> dict[str, tuple[Any, Any]]:
    """For every variant its `Reference`, and our logits of it in bf16 on the CPU."""
    import torch

    subprocess.run([sys.executable, "-m", __name__, path], cwd=ROOT, check=True, timeout=200)
    made: dict[str, tuple[Any, Any]] = torch.load(path, weights_only=False)
    return made


def _main() -> None:
    sys.modules["mamba_ssm"] = None  # type: ignore[assignment]

    import torch

    from pipeline.mcore import backend
    from pipeline.sharding import ParallelDims
    from tests.unit.mcore.models import (
        VARIANTS,
        logits_of,
        make_reference,
        make_slots,
        run_layers,
    )

    made = {}
    groups = backend.start(ParallelDims(), 0, torch.device("cpu"))
    for variant in VARIANTS:
        reference = make_reference(variant)
        tensors = dict(reference.tensors)
        embedding = "backbone.embeddings.weight"
        reference.tensors[embedding] = tensors[embedding].bfloat16()
        slots = make_slots(reference, groups, dtype=torch.bfloat16)
        hidden = run_layers(reference, groups, slots)
        assert hidden.dtype is torch.bfloat16
        reference.tensors.update(tensors)
        made[variant] = reference, logits_of(reference, hidden.float())
    torch.save(made, sys.argv[1])


if __name__ == "__main__":
    _main()
