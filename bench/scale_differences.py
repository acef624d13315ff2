"""Compares two exported directories of one model: packed bytes, and scales from activations.

    python -m bench.scale_differences DIR_A DIR_B

Prints one JSON object: whether all packed tensors and weight scales are byte-identical, and the
largest and median relative difference of input_scale, k_scale and v_scale.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from safetensors import safe_open

ACTIVATION_SCALARS = (".input_scale", ".k_scale", ".v_scale")


def main() -> None:
    """Compares and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directories", nargs=2, type=Path, metavar="DIR")
    first, second = map(read, parser.parse_args().directories)
    assert set(first) == set(second), "the directories hold other tensors"
    scalars = {name for name in first if name.endswith(ACTIVATION_SCALARS)}
    differing = [
        name for name in sorted(set(first) - scalars) if not same_bytes(first[name], second[name])
    ]
    relative = {
        name: abs(float(first[name]) - float(second[name])) / float(first[name]) for name in scalars
    }
    worst = max(relative, key=lambda name: relative[name])
    result = {
        "tensors": len(first),
        "other_tensors_identical": not differing,
        "differing": differing[:5],
        "scalars": len(scalars),
        "largest_relative_difference": relative[worst],
        "largest_at": worst,
        "median_relative_difference": statistics.median(relative.values()),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def read(directory: Path) -> dict[str, object]:
    """Every tensor of a directory by name."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def same_bytes(a: object, b: object) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    import torch

    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    raw = [t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


if __name__ == "__main__":
    main()
