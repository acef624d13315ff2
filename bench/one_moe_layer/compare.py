"""Two exports of the layer, tensor by tensor and block by block.

In: two directories and the layer (for the weights that were quantized). Out: how many tensors and
blocks differ, and who errs less where they do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.architecture import TensorSpec
from pipeline.nvfp4 import PackedWeight, dequantize_weight
from pipeline.nvfp4.formats import BLOCK_SIZE

from .layer import Layer

Read = Callable[[str], torch.Tensor]
PARTS = ("weight", "weight_scale", "weight_scale_2")


def compare(layer: Layer, ours: Path, theirs: Path) -> dict[str, Any]:
    """Compares every tensor of the layer; both exports must hold the same names."""
    with contextlib.ExitStack() as stack:
        names_a, read_a = _open(stack, ours, layer.device)
        names_b, read_b = _open(stack, theirs, layer.device)
        names_b = {name for name in names_b if name.startswith("backbone.layers.")}
        linears = [spec for spec in layer.tensors if spec.is_linear_weight]
        nvfp4 = [spec for spec in linears if f"{spec.module}.weight_scale_2" in names_a & names_b]
        fp8 = [
            spec
            for spec in linears
            if spec not in nvfp4 and f"{spec.module}.weight_scale" in names_a & names_b
        ]
        quantized = {f"{spec.module}.{part}" for spec in (*nvfp4, *fp8) for part in PARTS}
        scalars = sorted(name for name in names_a & names_b if name.endswith(".input_scale"))
        rest = sorted((names_a & names_b) - quantized - set(scalars))
        return {
            "only_ours": sorted(names_a - names_b)[:5],
            "only_theirs": sorted(names_b - names_a)[:5],
            "nvfp4": _compare_nvfp4(layer, nvfp4, read_a, read_b),
            "fp8": _compare_fp8(layer, fp8, read_a, read_b),
            "input_scale": _compare_scalars(scalars, read_a, read_b),
            "copied": {
                "tensors": len(rest),
                "differing": [n for n in rest if not _same(read_a(n), read_b(n))][:5],
            },
        }


def _open(
    stack: contextlib.ExitStack, directory: Path, device: torch.device
) -> tuple[set[str], Read]:
    """Names in all files of a directory, as a checkpoint spells them, and how to read one."""
    found: dict[str, tuple[Any, str]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt", device=str(device)))
        for name in file.keys():  # noqa: SIM118
            found[name.replace("model.layers.", "backbone.layers.", 1)] = (file, name)

    def read(name: str) -> torch.Tensor:
        file, stored = found[name]
        tensor: torch.Tensor = file.get_tensor(stored)
        return tensor

    return set(found), read


def _compare_nvfp4(
    layer: Layer, specs: list[TensorSpec], read_a: Read, read_b: Read
) -> dict[str, Any]:
    """Counts tensors and blocks that differ, and compares the squared error of those blocks.

    Blocks are compared where `weight_scale_2` is the same. It is on a GPU; on a CPU, where dividing
    by a constant is another operation, its last bit may not be, and codes then differ for that.
    """
    counts = dict.fromkeys(
        (
            "tensors",
            "blocks",
            "differing_tensors",
            "differing_weight_scale_2",
            "differing_blocks",
            "blocks_of_equal_scale_with_other_codes",
            "blocks_where_ours_errs_less",
            "blocks_where_theirs_errs_less",
        ),
        0,
    )
    errors = torch.zeros(2, dtype=torch.float64)
    for spec in specs:
        a, b = (
            PackedWeight(*(read(f"{spec.module}.{part}") for part in PARTS))
            for read in (read_a, read_b)
        )
        counts["tensors"] += 1
        counts["blocks"] += a.weight_scale.numel()
        if all(_same(getattr(a, n), getattr(b, n)) for n in _FIELDS):
            continue
        counts["differing_tensors"] += 1
        if not _same(a.weight_scale_2, b.weight_scale_2):
            counts["differing_weight_scale_2"] += 1
            continue
        other_scale = _bytes(a.weight_scale) != _bytes(b.weight_scale)
        codes = (a.codes != b.codes).unflatten(-1, (-1, BLOCK_SIZE // 2)).any(-1)
        differing = other_scale | codes
        counts["differing_blocks"] += int(differing.sum())
        counts["blocks_of_equal_scale_with_other_codes"] += int((codes & ~other_scale).sum())
        weight = layer.weight(spec).float()
        error_a, error_b = (_block_errors(packed, weight)[differing] for packed in (a, b))
        counts["blocks_where_ours_errs_less"] += int((error_a < error_b).sum())
        counts["blocks_where_theirs_errs_less"] += int((error_b < error_a).sum())
        errors += torch.stack([error_a.sum(), error_b.sum()]).cpu()
    ours, theirs = errors.tolist()
    return {**counts, "squared_error_there": {"ours": ours, "theirs": theirs}}


_FIELDS = ("codes", "weight_scale", "weight_scale_2")


def _block_errors(packed: PackedWeight, weight: torch.Tensor) -> torch.Tensor:
    """Squared error of each block, fp64 [N, K / 16]."""
    difference = dequantize_weight(packed).double() - weight
    errors: torch.Tensor = difference.square_().unflatten(-1, (-1, BLOCK_SIZE)).sum(-1)
    return errors


def _compare_fp8(
    layer: Layer, specs: list[TensorSpec], read_a: Read, read_b: Read
) -> dict[str, Any]:
    """Per tensor: whether bytes and scale are the same, and the squared error of both.

    Model Optimizer divides a BF16 weight by an FP32 scalar tensor, which gives BF16, and rounds
    that to E4M3; we divide in FP32 and round once. `unexplained_bytes` of its export come from
    something else.
    """
    found = {}
    for spec in specs:
        stored = layer.weight(spec)
        weight = stored.double()
        codes_a, codes_b = (read(f"{spec.module}.weight") for read in (read_a, read_b))
        scale_a, scale_b = (read(f"{spec.module}.weight_scale") for read in (read_a, read_b))
        rounded_twice = (stored / scale_b).to(torch.float8_e4m3fn)
        found[spec.module.split(".mixer.")[1]] = {
            "same_scale": _same(scale_a, scale_b),
            "scale_deviation": float(scale_a) / float(scale_b) - 1.0,
            "multiplier": float(scale_a.double() * 448 / weight.abs().max()),
            "differing_bytes": int((_bytes(codes_a) != _bytes(codes_b)).sum()),
            "bytes": codes_a.numel(),
            "unexplained_bytes": int((_bytes(codes_b) != _bytes(rounded_twice)).sum()),
            "squared_error": {
                "ours": float((codes_a.double() * scale_a.double() - weight).square().sum()),
                "theirs": float((codes_b.double() * scale_b.double() - weight).square().sum()),
            },
        }
    return found


def _compare_scalars(names: list[str], read_a: Read, read_b: Read) -> dict[str, Any]:
    """Relative deviations of input scales, one per projection (routed experts share theirs)."""
    deviations: dict[str, float] = {}
    for name in names:
        projection = name.split(".mixer.")[1]
        parts = projection.split(".")
        kind = ".".join(part for part in parts if not part.isdigit()).removesuffix(".input_scale")
        deviation = abs(float(read_a(name)) / float(read_b(name)) - 1.0)
        deviations[kind] = max(deviation, deviations.get(kind, 0.0))
    return {"scalars": len(names), "largest_relative_deviation": deviations}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bit patterns: integers of the tensor's own element size."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(widths[tensor.dtype.itemsize])
