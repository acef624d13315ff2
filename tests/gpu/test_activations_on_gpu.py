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


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (301, 5, 48), (7, 3, 1023), (129, 4099), (0, 16)])
def test_fp8_and_counts(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = _inputs(*shape, dtype=dtype)
    amax = torch.tensor(3.0)
    for bound in (amax, torch.stack([amax, amax])[1]):  # that one is not aligned
        on_gpu = fp8_input(x.to(GPU), (bound / 448).to(GPU), backend)
        assert on_gpu.dtype is dtype
        assert _bits(on_gpu).equal(_bits(fp8_input(x, bound / 448, "reference")))
        count = count_beyond(x.to(GPU), bound.to(GPU), backend)
        assert count.cpu().equal(count_beyond(x, bound, "reference"))
    # A scale on the host is moved, not applied as its reciprocal.
    assert _bits(fp8_input(x.to(GPU), amax / 448, backend)).equal(_bits(on_gpu))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-100, 1e-38, 2.0**-149])
def test_every_tie_zero_and_huge_value_in_fp8(
    backend: str, dtype: torch.dtype, scale: float
) -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = [(ties.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)]
    rest = torch.tensor([0.0, 2.0**-149, 463.9, 464.0, 3e38, torch.inf])
    x = torch.cat([codes, *near, rest])
    x = torch.cat([x, -x, x * scale, -x * scale])[None].to(dtype)
    expected = fp8_input(x, torch.tensor(scale), "reference")
    assert _bits(fp8_input(x.to(GPU), torch.tensor(scale), backend)).equal(_bits(expected))


def test_every_bf16_value_in_fp8() -> None:
    x = torch.arange(65536).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    for scale in (1.0, 0.7e-3, 3e-30, 1e30):
        expected = fp8_input(x, torch.tensor(scale), "reference")
        found = fp8_input(x.to(GPU), torch.tensor(scale), "triton").cpu()
        assert found.isnan().equal(expected.isnan())
        known = ~expected.isnan()
        assert _bits(found[known]).equal(_bits(expected[known]))


def test_views_are_read_where_they_lie() -> None:
    """Keys are a part of what the projection gives."""
    qkv = _inputs(33, 2, 96, dtype=torch.bfloat16).to(GPU)
    keys, amax = qkv[..., 32:64].unflatten(-1, (2, 16)), torch.tensor(0.5)
    for backend in ("reference", "triton"):
        quantized = fp8_input(keys, amax / 448, backend)
        assert _bits(quantized).equal(_bits(fp8_input(keys.cpu(), amax / 448, "reference")))
        assert count_beyond(keys, amax, backend) == (keys.abs() > amax.to(GPU)).sum()


def test_not_a_number_stays() -> None:
    x = torch.zeros(4, 16, device=GPU)
    x[1, 3] = torch.nan
    for backend in ("reference", "triton"):
        for read in (nvfp4_input, fp8_input):
            assert read(x, torch.tensor(1e-3), backend)[1, 3].isnan()
        assert count_beyond(x, torch.tensor(-1.0), backend) == x.numel() - 1


def test_more_elements_than_32_bits_count() -> None:
    x = torch.ones(2**17 + 1, 2**15, dtype=torch.bfloat16, device=GPU)
    for read, scale in ((nvfp4_input, 1 / 2688), (fp8_input, 1 / 448)):
        quantized = read(x, torch.tensor(scale), "triton")
        assert quantized.eq(quantized[0, 0]).all()
        assert quantized[0, 0] == 1
        del quantized
    for backend in ("reference", "triton"):
        assert count_beyond(x, torch.tensor(0.5), backend) == x.numel()
