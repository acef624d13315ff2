"""The audit of values: every scale finite and positive, fused scalars equal, blocks that flush.

In: the place of every tensor and the algorithm of every projection. Out: problems, and per layer
the share of NVFP4 blocks that Hopper's weight-only kernels flush to zero. Files are mapped, one
tensor at a time is looked at; codes are read only where a block scale is small.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.checkpoint.audit_config import Declared
from pipeline.checkpoint.ignore_rules import fused_groups
from pipeline.checkpoint.quantization_config import NVFP4_ALGORITHMS
from pipeline.checkpoint.regular_files import open_regular
from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.nvfp4.formats import BLOCK_SIZE

_SCALARS = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
_E4M3_NAN = 0x7F  # 0xFF is the negative one
_FIRST_NORMAL = 0x08  # the byte of 2**-6: bytes 1 to 7 are the subnormals, which Hopper flushes
_BATCH = 256  # projections per task: handing them out one by one costs more than the look
_MAGNITUDES = 0x77  # both codes of a byte without their signs


class MappedTensors:
    """Bytes of tensors through one map per file, opened on first use."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}
        for path in {info.path for info in tensors.values()}:
            with open(open_regular(path), "rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The bytes of a tensor, not copied."""
        info = self.tensors[name]
        return np.frombuffer(
            self._maps[info.path], dtype=np.uint8, count=info.nbytes, offset=info.start
        )

    def scalar(self, name: str) -> float:
        """The value of an F32 scalar; NaN where what is stored is no such thing."""
        info = self.tensors[name]
        if info.nbytes != 4:
            return math.nan
        value: float = struct.unpack_from("<f", self._maps[info.path], info.start)[0]
        return value


@dataclasses.dataclass(frozen=True)
class BlockCount:
    """Block scales of one projection.

    Attributes:
        module: The projection.
        blocks: Number of blocks of 16.
        flushed: Blocks with codes other than zero and a scale below 2**-6.
        problem: What is wrong with the scales; empty where nothing is.
    """

    module: str
    blocks: int
    flushed: int
    problem: str


def check_scalars(mapped: MappedTensors) -> list[str]:
    """Every F32 scalar scale is finite and positive."""
    problems = []
    for name, info in mapped.tensors.items():
        if info.dtype == "F32" and info.shape == () and name.rpartition(".")[2] in _SCALARS:
            value = mapped.scalar(name)
            if not (math.isfinite(value) and value > 0):
                problems.append(f"{name} is {value}; scales must be finite and positive")
    return problems


def check_fused_scalars(mapped: MappedTensors, declared: Declared) -> list[str]:
    """q/k/v share `weight_scale_2` and `input_scale`: servers keep one value of the three."""
    problems = []
    for unit, members in fused_groups(declared.algorithms).items():
        for suffix in ("weight_scale_2", "input_scale"):
            names = [f"{member}.{suffix}" for member in members]
            values = {mapped.scalar(name) for name in names if name in mapped.tensors}
            if len(values) > 1:
                problems.append(f"{unit}: {suffix} differs ({sorted(values)})")
    return problems


def scan_blocks(mapped: MappedTensors, declared: Declared, workers: int) -> list[BlockCount]:
    """Looks at the block scales of every NVFP4 projection that is stored as one."""
    modules = [
        module
        for module, algorithm in declared.algorithms.items()
        if algorithm in NVFP4_ALGORITHMS and _is_packed(mapped.tensors, module)
    ]
    batches = [modules[start : start + _BATCH] for start in range(0, len(modules), _BATCH)]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda batch: [_scan(mapped, module) for module in batch], batches)
        return [count for batch in found for count in batch]


def flushed_shares(counts: Iterable[BlockCount]) -> dict[int, float]:
    """Flushed blocks over all blocks, per layer."""
    totals: dict[int, tuple[int, int]] = {}
    for count in counts:
        layer = int(count.module.split(".")[2])
        blocks, flushed = totals.get(layer, (0, 0))
        totals[layer] = (blocks + count.blocks, flushed + count.flushed)
    return {layer: flushed / blocks for layer, (blocks, flushed) in sorted(totals.items())}


def _is_packed(tensors: Mapping[str, TensorInfo], module: str) -> bool:
    codes = tensors.get(f"{module}.weight")
    scale = tensors.get(f"{module}.weight_scale")
    return (
        codes is not None
        and scale is not None
        and (codes.dtype, scale.dtype) == ("U8", "F8_E4M3")
        and codes.nbytes == scale.nbytes * BLOCK_SIZE // 2
    )


def _scan(mapped: MappedTensors, module: str) -> BlockCount:
    scales = mapped.array(f"{module}.weight_scale")
    if not scales.size:
        return BlockCount(module, 0, 0, "")
    # Good bytes are 1 (2**-9) to 0x7E (448); minus 1, wrapping, all others are 0x7E and above.
    # Byte arithmetic runs at memory speed, so the histogram is made for bad tensors only.
    shifted = scales - np.uint8(1)
    problem = ""
    if shifted.max() >= _E4M3_NAN - 1:
        counts = np.bincount(scales, minlength=256)
        faults = {
            "NaN": counts[_E4M3_NAN] + counts[0xFF],
            "negative": counts[0x81:0xFF].sum(),
            "zero": counts[0x00] + counts[0x80],
        }
        found = ", ".join(f"{number} {fault}" for fault, number in faults.items() if number)
        problem = f"{module}.weight_scale has {found} of {scales.size} scales"
    flushed = 0
    if shifted.min() < _FIRST_NORMAL - 1:
        small = np.flatnonzero(shifted < _FIRST_NORMAL - 1)
        codes = mapped.array(f"{module}.weight").reshape(-1, BLOCK_SIZE // 2)[small]
        flushed = int(np.count_nonzero((codes & _MAGNITUDES).any(axis=1)))
    return BlockCount(module, int(scales.size), flushed, problem)
