"""Made-up weights on a GPU: bit for bit those of the CPU."""

import math
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture, expected_tensors
from pipeline.checkpoint import synthetic
from pipeline.checkpoint.random_values import Window, fill_normal, key_of
from pipeline.checkpoint.synthetic import SyntheticSource
from pipeline.job import estimate_stored
from pipeline.sharding import ParallelDims, shard_of
from tests.unit.checkpoint.tiny import tiny_config

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
# Wider than one tile of the kernel, and no multiple of it.
CONFIG = tiny_config(
    hidden_size=1008, mamba_num_heads=4, n_groups=2, num_attention_heads=4, num_key_value_heads=2
)
UP = "backbone.layers.1.mixer.experts.{}.up_proj.weight"


def make(device: torch.device, **changes: Any) -> SyntheticSource:
    config = CONFIG | changes
    stored = estimate_stored(Architecture.from_hf_config(config))
    return SyntheticSource("tiny", config, stored, seed=0, device=device)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, signs of zeros included."""
    kind = torch.int16 if a.dtype.itemsize == 2 else torch.int32
    return a.dtype is b.dtype and torch.equal(a.cpu().view(kind), b.cpu().view(kind))


def test_every_tensor_and_shard() -> None:
    on_cpu, on_gpu = make(CPU), make(GPU)
    architecture, dims = Architecture.from_hf_config(on_cpu.config), ParallelDims(world=2, tp=2)
    for name in on_cpu.tensors:
        assert same(on_gpu.read(name), on_cpu.read(name)), name
    for spec in expected_tensors(architecture):
        for rank in range(dims.world):
            shard = shard_of(spec, architecture, dims, rank)
            assert same(on_gpu.read(spec.name, shard), on_cpu.read(spec.name, shard)), spec.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_bf16", [True, False])
@pytest.mark.parametrize("shape", [(3, 21, 600), (2, 37, 4), (1, 1, 1), (2, 16, 1024)])
@pytest.mark.parametrize("window", [Window(700, 3, 9), Window(1024), Window(4, 2**31), Window(1)])
def test_every_window(
    dtype: torch.dtype, is_bf16: bool, shape: tuple[int, int, int], window: Window
) -> None:
    keys = [key_of(0, str(number)) for number in range(shape[0])]
    made = []
    for device in (CPU, GPU):
        target = torch.zeros(*shape[:2], shape[2] + 3, dtype=dtype, device=device)
        part = target[..., : shape[2]]
        fill_normal(part, keys, window, standard_deviation=0.07, is_bf16=is_bf16)
        assert target[..., shape[2] :].count_nonzero() == 0
        made.append(target)
    assert same(*made)


def test_a_stack_of_experts() -> None:
    on_cpu, on_gpu = make(CPU, n_routed_experts=8), make(GPU, n_routed_experts=8)
    shape = on_cpu.info(UP.format(0)).shape
    stack = torch.empty(8, *shape, dtype=torch.bfloat16, device=GPU)
    on_gpu.fill_all((UP.format(e), None, stack[e]) for e in range(8))
    for e in range(8):
        assert same(stack[e], on_cpu.read(UP.format(e)))


def test_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK_BYTES", 50_000)
    on_cpu, on_gpu = make(CPU), make(GPU)
    for name in on_cpu.tensors:
        ours, theirs = (
            b"".join(bytes(chunk) for chunk in source.copy_of(name).chunks())
            for source in (on_gpu, on_cpu)
        )
        assert ours == theirs, name


def test_offsets_beyond_32_bits_of_elements() -> None:
    """The target itself has more than 2**31 elements, as the expert stacks of large models do."""
    matrices, rows, columns = 5, 8192, 65536
    target = torch.empty(matrices, rows, columns, dtype=torch.bfloat16, device=GPU)
    assert target.numel() > 2**31
    keys = [key_of(0, str(number)) for number in range(matrices)]
    fill_normal(target, keys, Window(columns), standard_deviation=1.0, is_bf16=True)
    last = torch.empty(1, 2, columns, dtype=torch.bfloat16)
    window = Window(columns, first_row=rows - 2)
    fill_normal(last, keys[-1:], window, standard_deviation=1.0, is_bf16=True)
    assert same(target[-1:, -2:], last)
    assert math.isclose(target[0].float().std().item(), 1.0, rel_tol=0.03)
