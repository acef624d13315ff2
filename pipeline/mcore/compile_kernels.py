"""Compiles the kernels of a job in a process of its own, while the job still plans.

In: lines of JSON on stdin: first the model (`Request`), later the recipe's formats. Out: Triton's
cache on disk, warm; nothing else. One layer of each type runs over a few made-up tokens, so
that kernels are compiled for the widths, strides and dtypes that the sweep will use (on one rank;
where ETP cuts the experts' width, their products are compiled again). The process that started
this one goes on without it if it fails; it ends with that process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TextIO

import torch

from pipeline.architecture import Architecture, TensorSpec
from pipeline.checkpoint.random_values import Window, fill_normal
from pipeline.mcore import backend
from pipeline.mcore.kernels.combine import combine
from pipeline.mcore.slots import Slot, build_slots
from pipeline.nvfp4.activations import count_beyond, fp8_input, nvfp4_input, sum_squares
from pipeline.nvfp4.backends import Backend, get_backend
from pipeline.nvfp4.formats import WeightMethod
from pipeline.sharding import ParallelDims, Shard

_SEQUENCES = 2
# A multiple of all sizes by which kernels tell shapes apart.
_EXPERTS, _ROWS, _COLUMNS = 2, 256, 512


class Request(NamedTuple):
    """What the sweep will compute.

    Attributes:
        config: The model's config.json.
        layers: One layer of each type.
        sums_in_fp32: Whether experts of several ranks add up, which happens in fp32.
        dtypes: Of those layers' tensors in the source that are not in bf16, as torch calls them.
        device: As torch names it, for example "cuda:0".
        compute_dtype: Of weights and activations.
        seq_len: Length of a sequence.
        fills: Whether the weights are made up on the device.
    """

    config: Mapping[str, Any]
    layers: Sequence[int]
    sums_in_fp32: bool
    dtypes: Mapping[str, str]
    device: str
    compute_dtype: str
    seq_len: int
    fills: bool


class Formats(NamedTuple):
    """How the recipe stores weights.

    Attributes:
        methods: How NVFP4 block scales are chosen.
        compare_to_max: Whether method max is measured too.
        fp8: Whether weights are stored as FP8.
        multipliers: Sets of candidates for the amax of FP8 weights.
        backend: Name of what packs.
        evaluates: Whether layers are computed as served too.
    """

    methods: Sequence[str]
    compare_to_max: bool
    fp8: bool
    multipliers: Sequence[Sequence[float]]
    backend: str
    evaluates: bool


def main(requests: TextIO) -> None:
    """Compiles what each line asks for."""
    request = Request(**json.loads(requests.readline()))
    device = torch.device(request.device)
    compile_layers(request, device)
    for line in requests:
        compile_packing(Formats(**json.loads(line)), device, request.compute_dtype)


def compile_layers(request: Request, device: torch.device) -> None:
    """Runs one layer of each type with and without a tap: both variants may be needed."""
    architecture = Architecture.from_hf_config(request.config)
    dtype: torch.dtype = getattr(torch, request.compute_dtype)
    slots = build_slots(
        architecture,
        ParallelDims(),
        0,
        backend.start(ParallelDims(), 0, device),
        device=device,
        compute_dtype=dtype,
        seq_len=request.seq_len,
    )

    def read(spec: TensorSpec, shard: Shard) -> torch.Tensor:
        name = re.sub(r"\.experts\.\d+\.", ".experts.0.", spec.name)
        source = getattr(torch, request.dtypes.get(name, "bfloat16"))
        return torch.zeros(shard.shape, dtype=source, device=device)

    def run(layer: int) -> None:
        slot: Slot = slots[architecture.layers[layer]]
        slot.fill(layer, read)
        shape = (request.seq_len, _SEQUENCES, architecture.hidden_size)
        hidden = torch.zeros(shape, dtype=dtype, device=device)
        for tap in (_WantsAll(device), None):
            slot.forward(hidden, tap)

    # The compiler and the assembler leave the interpreter to other threads.
    with _threads(device) as threads:
        runs = [threads.submit(run, layer) for layer in request.layers]
        if request.fills:
            runs.append(threads.submit(_fill, device))
        if request.sums_in_fp32:
            width = architecture.moe_latent_size or architecture.hidden_size
            runs.append(threads.submit(_combine, width, architecture.num_experts_per_tok, device))
        for done in runs:
            done.result()
    _synchronize(device)


def compile_packing(formats: Formats, device: torch.device, compute_dtype: str) -> None:
    """Packs a small weight in every format, and reads it as a server would."""
    packs = get_backend(formats.backend)
    dtype: torch.dtype = getattr(torch, compute_dtype)
    weight = torch.ones(_EXPERTS, _ROWS, _COLUMNS, dtype=torch.bfloat16, device=device)
    amax = packs.tensor_amax(weight)
    with _threads(device) as threads:
        runs: list[Future[Any]] = [
            threads.submit(_pack, packs, weight, amax, WeightMethod(method), formats.compare_to_max)
            for method in formats.methods
        ]
        runs += [
            threads.submit(packs.fp8_squared_errors, weight, amax, tuple(multipliers))
            for multipliers in formats.multipliers
        ]
        if formats.fp8:
            runs.append(threads.submit(packs.pack_fp8, weight, amax))
        if formats.evaluates:
            inputs, ones = weight.to(dtype), torch.ones(_ROWS, device=device)
            runs += [
                threads.submit(_serve, packs, inputs, amax, WeightMethod(method))
                for method in formats.methods
            ]
            runs += [
                threads.submit(read, inputs, amax[0], formats.backend)
                for read in (nvfp4_input, fp8_input, count_beyond)
            ]
            runs += [
                threads.submit(sum_squares, inputs, ones, formats.backend, subtracted)
                for subtracted in (None, inputs)
            ]
        for done in runs:
            done.result()
    _synchronize(device)


class _WantsAll:
    """A tap that wants the amax of everything."""

    def __init__(self, device: torch.device) -> None:
        self._amax = torch.zeros(1, device=device)

    def activation(self, projection: str, x: torch.Tensor) -> None:
        pass

    def amax_of(self, projection: str) -> torch.Tensor:
        return self._amax

    def routing(self, chosen_TK: torch.Tensor) -> None:
        pass


def _pack(
    packs: Backend, weight: torch.Tensor, amax: torch.Tensor, method: WeightMethod, compare: bool
) -> None:
    plain = method in (WeightMethod.max, WeightMethod.max_dynamic)
    packs.pack_nvfp4(weight, amax, method, compare_to_max=compare and not plain)


def _serve(packs: Backend, weight: torch.Tensor, amax: torch.Tensor, method: WeightMethod) -> None:
    packed = packs.quantize_nvfp4(weight, amax, method)
    served = packs.dequantize_nvfp4(packed, weight.dtype)
    packs.zero_flushed(served, packed.weight_scale)


def _combine(width: int, top_k: int, device: torch.device) -> None:
    rows = torch.zeros(_ROWS, width, dtype=torch.bfloat16, device=device)
    position = torch.zeros(_ROWS, top_k, dtype=torch.int32, device=device)
    combine(rows, position, position.float(), torch.float32)


def _fill(device: torch.device) -> None:
    """Matrices, a vector, and a weight of the router."""
    window = Window(_COLUMNS)
    for dtype, is_bf16, rows in (
        (torch.bfloat16, True, _ROWS),
        (torch.bfloat16, True, 1),
        (torch.float32, False, _ROWS),
    ):
        target = torch.empty(_EXPERTS, rows, _COLUMNS, dtype=dtype, device=device)
        keys = [(1, 2)] * _EXPERTS
        fill_normal(target, keys, window, standard_deviation=0.02, is_bf16=is_bf16)


def _threads(device: torch.device) -> ThreadPoolExecutor:
    """Threads on the device: one of its own would be on the first."""
    if device.type != "cuda":
        return ThreadPoolExecutor()
    return ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    try:
        main(sys.stdin)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # NCCL and CUDA take some ten seconds to say goodbye; the system does it at once.
    os._exit(0)
