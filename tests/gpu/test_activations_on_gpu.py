"""Quantized inputs on a GPU: the bits that plain torch gives on the CPU."""

import pytest
import torch

from pipeline.nvfp4.activations import count_beyond, fp8_input, nvfp4_input

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


def _inputs(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Of very different magnitudes, with zero and tiny blocks."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    x = x * torch.logspace(-7, 1, shape[0]).view(-1, *([1] * (len(shape) - 1)))
    x[::5] = 0
    return x.to(dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (301, 1344), (37, 5, 48), (9, 3, 2, 128)])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_nvfp4(backend: str, dtype: torch.dtype, shape: tuple[int, ...], factor: float) -> None:
    x = _inputs(*shape, dtype=dtype)
    scale = (x.float().abs().max() * factor / 2688).clamp(min=1e-6)
    on_gpu = nvfp4_input(x.to(GPU), scale.to(GPU), backend)
    assert on_gpu.dtype is dtype
    assert on_gpu.cpu().equal(nvfp4_input(x, scale, "reference"))
    # A scale on the host is moved, not applied as its reciprocal.
    assert nvfp4_input(x.to(GPU), scale, backend).equal(on_gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_and_counts(dtype: torch.dtype) -> None:
    x = _inputs(301, 5, 48, dtype=dtype)
    amax = x.float().abs().max() * 0.3
    on_gpu = fp8_input(x.to(GPU), amax / 448)
    assert on_gpu.cpu().equal(fp8_input(x, amax / 448))
    assert count_beyond(x.to(GPU), amax).cpu().equal(count_beyond(x, amax))


def test_not_a_number_stays() -> None:
    x = torch.zeros(4, 16, device=GPU)
    x[1, 3] = torch.nan
    for backend in ("reference", "triton"):
        assert nvfp4_input(x, torch.tensor(1e-3), backend)[1, 3].isnan()


def test_more_elements_than_32_bits_count() -> None:
    x = torch.ones(2**17 + 1, 2**15, dtype=torch.bfloat16, device=GPU)
    quantized = nvfp4_input(x, torch.tensor(1 / 2688), "triton")
    assert quantized.eq(quantized[0, 0]).all()
    assert quantized[0, 0] == 1
    assert count_beyond(x, torch.tensor(0.5)) == x.numel()
