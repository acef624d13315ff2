"""The audit against the source: copied tensors byte for byte, quantized ones by their error.

In: the finished directory's tensors and the opened source. Out: problems, and the relative error
`||dequantized - source|| / ||source||` (Frobenius) of every quantized tensor, from the files. What
is too much says `weight_errors`.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint.audit_config import Declared
from pipeline.checkpoint.audit_scales import MappedTensors
from pipeline.checkpoint.audit_tensors import Expected
from pipeline.checkpoint.quantization_config import NVFP4_ALGORITHMS
from pipeline.checkpoint.source import Source, read_json
from pipeline.checkpoint.source_check import is_mtp
from pipeline.checkpoint.weight_errors import WeightErrors, compare_weights, read_errors
from pipeline.nvfp4.reference import PackedWeight, dequantize_nvfp4


def check_passthrough(
    mapped: MappedTensors, expected: Mapping[str, Expected], source: Source, workers: int
) -> list[str]:
    """Tensors that are copied must be the source's, in dtype, shape and bytes; so all of mtp.*."""
    names = [name for name, entry in expected.items() if entry.is_passthrough]
    names += sorted(
        {name for name in mapped.tensors if is_mtp(name)}
        | {name for name in source.tensors if is_mtp(name)}
    )
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda name: _difference(mapped, source, name), names)
    return [problem for problem in found if problem]


def check_small_files(directory: Path, source: Source) -> list[str]:
    """Small files of the source that are absent or differ here; config.json but for its format."""
    problems = []
    config = read_json(directory / "config.json", "must be a model's config.json")
    for key in sorted((set(config) | set(source.config)) - {"quantization_config"}):
        # repr: NaN and Infinity may stand in a config, and NaN is not equal to itself.
        if repr(config.get(key)) != repr(source.config.get(key)):
            problems.append(f"config.json {key} differs from the source's")
    for relative, path in source.small_files.items():
        copy = directory / relative
        if not copy.is_file():
            problems.append(f"{relative} of the source is missing")
        elif not filecmp.cmp(copy, path, shallow=False):
            problems.append(f"{relative} differs from the source's")
    return problems


def measure_errors(
    mapped: MappedTensors, declared: Declared, source: Source, workers: int
) -> tuple[dict[str, float], list[str]]:
    """Relative error of every quantized tensor that both sides hold, and implausible ones."""
    modules = [
        module
        for module in declared.algorithms
        if f"{module}.weight" in source.tensors and f"{module}.weight" in mapped.tensors
    ]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(
            lambda module: _compare(mapped, declared.algorithms[module], source, module), modules
        )
        errors = dict(zip(modules, found, strict=True))
    problems = [
        f"{module}.weight {fault}"
        for module, error in errors.items()
        if (fault := error.fault(declared.algorithms[module]))
    ]
    return {module: error.relative for module, error in errors.items()}, problems


def _difference(mapped: MappedTensors, source: Source, name: str) -> str:
    ours, theirs = mapped.tensors.get(name), source.tensors.get(name)
    if theirs is None:
        return f"{name} is not in the source"
    if ours is None:
        return f"{name} of the source is missing" if is_mtp(name) else ""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return (
            f"{name}: {ours.dtype} {list(ours.shape)} instead of the source's "
            f"{theirs.dtype} {list(theirs.shape)}"
        )
    stored, position = mapped.array(name), 0
    for chunk in source.copy_of(name).chunks():
        piece = np.frombuffer(chunk, dtype=np.uint8)
        if not np.array_equal(stored[position : position + piece.size], piece):
            return f"{name}: other bytes than the source's"
        position += piece.size
    return ""


def _compare(mapped: MappedTensors, algorithm: str, source: Source, module: str) -> WeightErrors:
    """Row pieces of at most 4 Mi elements keep what is computed in fp64 within 200 MB."""
    weight = source.read(f"{module}.weight")
    if weight.dtype is not torch.bfloat16:
        weight = weight.to(torch.bfloat16)  # what `cast` does before anything else
    name = f"{module}.weight_scale" + "_2" * (algorithm in NVFP4_ALGORITHMS)
    total, step = WeightErrors(), max(1, (4 << 20) // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        try:
            stored = _dequantize(mapped, algorithm, module, rows)
            found = compare_weights(stored, weight[rows], algorithm, mapped.scalar(name))
        except (KeyError, RuntimeError, ValueError):
            return WeightErrors(math.nan, 1.0)  # a scale is missing, which other checks name
        total += read_errors(found.tolist(), weight.shape[1]).moved(first)
    return total


def _dequantize(mapped: MappedTensors, algorithm: str, module: str, rows: slice) -> torch.Tensor:
    codes = _rows(mapped, f"{module}.weight", rows)
    if algorithm in NVFP4_ALGORITHMS:
        scale_2 = torch.tensor(mapped.scalar(f"{module}.weight_scale_2"), dtype=torch.float32)
        scales = _rows(mapped, f"{module}.weight_scale", rows).view(torch.float8_e4m3fn)
        return dequantize_nvfp4(PackedWeight(codes, scales, scale_2))
    scale = torch.tensor(mapped.scalar(f"{module}.weight_scale"), dtype=torch.float32)
    return codes.view(torch.float8_e4m3fn).float() * scale


def _rows(mapped: MappedTensors, name: str, rows: slice) -> torch.Tensor:
    """Rows of a tensor of one-byte elements, as uint8."""
    array = mapped.array(name).reshape(mapped.tensors[name].shape)
    return torch.from_numpy(array[rows].copy())
