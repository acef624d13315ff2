"""The layers' Triton kernels on a GPU against plain torch; the same bits twice."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from pipeline.mcore.attention import attend
from pipeline.mcore.kernels.activation import raise_amax, relu_squared_
from pipeline.mcore.kernels.convolution import _convolve_in_torch, convolve
from pipeline.mcore.kernels.norm import gated_rms_norm, rms_norm
from pipeline.mcore.kernels.scan import scan
from pipeline.mcore.norms import normalize
from pipeline.mcore.ssd import scan_in_torch

pytestmark = pytest.mark.gpu

DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16)
]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}  # of the last operation, relative


@pytest.fixture(autouse=True)
def _on_gpu() -> Iterator[None]:
    torch.manual_seed(3)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 77, 8192, 100_003])
def test_squares_are_exact_and_raise_the_amax(size: int, dtype: torch.dtype) -> None:
    x, amax = (3.0 * torch.randn(size)).to(dtype), torch.zeros(1)
    expected = x.relu().square()
    assert torch.equal(relu_squared_(x.clone()), expected)
    assert torch.equal(relu_squared_(x.clone(), amax), expected)
    assert amax == expected.float().max()
    raise_amax(x, amax.zero_())
    assert amax == x.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_kept_and_raises_the_amax_to_inf(dtype: torch.dtype) -> None:
    x, amax, squared_amax = torch.randn(9000, dtype=dtype), torch.zeros(1), torch.zeros(1)
    x[8500] = -math.nan
    raise_amax(x, amax)
    assert relu_squared_(x, squared_amax)[8500].isnan()
    normed_amax = torch.zeros(1)
    assert rms_norm(x, torch.ones(9000), 1e-5, normed_amax).isnan().all()
    assert amax == squared_amax == normed_amax == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [12, 2688, 8191, 8192, 20_000])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = (3.0 * torch.randn(7, 3, width)).to(dtype), torch.randn(width).to(dtype)
    amax = torch.zeros(1)
    out = rms_norm(x, weight, 1e-5, amax)
    _assert_close(out, normalize(x.float(), 1e-5) * weight.float())
    assert amax == out.float().abs().max()
    assert torch.equal(rms_norm(x, weight, 1e-5), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "groups", "group_size"), [(1, 5, 1, 12), (3, 33, 4, 320), (2, 64, 8, 2048)]
)
def test_gated_norm_reads_and_writes_any_layout(
    batch: int, length: int, groups: int, group_size: int, dtype: torch.dtype
) -> None:
    channels = groups * group_size
    z_bld = torch.randn(length, batch, channels + 24, dtype=dtype)[..., :channels].transpose(0, 1)
    x_bld, weight = torch.randn(batch, length, channels, dtype=dtype), torch.randn(channels)
    out_bld = torch.empty(length, batch, channels, dtype=dtype).transpose(0, 1)
    amax = torch.zeros(1)
    gated_rms_norm(x_bld, z_bld, weight, 1e-5, group_size, out_bld=out_bld, amax=amax)
    gated = (x_bld.float() * F.silu(z_bld.float())).unflatten(-1, (groups, group_size))
    _assert_close(out_bld, normalize(gated, 1e-5).flatten(-2) * weight)
    assert amax == out_bld.float().abs().max()
    again_bld = torch.empty_like(x_bld)
    gated_rms_norm(x_bld, z_bld, weight, 1e-5, group_size, out_bld=again_bld)
    assert torch.equal(again_bld, out_bld)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width"),
    [(1, 5, 12, 4), (3, 33, 130, 2), (2, 1000, 384, 4), (1, 2, 64, 5)],
)
def test_convolution_reads_in_place(
    batch: int, length: int, channels: int, width: int, dtype: torch.dtype
) -> None:
    wide = torch.randn(length, batch, channels + 40, dtype=dtype)
    x_bld = wide[..., 16 : 16 + channels].transpose(0, 1)
    weight, bias = torch.randn(channels, width, dtype=dtype), torch.randn(channels, dtype=dtype)
    out_bld = convolve(x_bld, weight, bias)
    assert out_bld.is_contiguous()
    _assert_close(out_bld, _convolve_in_torch(x_bld.float(), weight, bias))
    assert torch.equal(convolve(x_bld, weight, bias), out_bld)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "head_dim", "state"),
    [(1, 37, 6, 3, 20, 24), (2, 300, 4, 2, 8, 16), (3, 1000, 32, 2, 64, 128)],
)
def test_scan(batch: int, length: int, heads: int, groups: int, head_dim: int, state: int) -> None:
    def run(first: int, last: int, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        parts = (x_blhp, dt_blh, rate_h, B_blgn, C_blgn, D_h, bias_h)
        return function(*(t[first:last] if t.ndim > 1 else t for t in parts))

    widths = (heads * head_dim, groups * state, groups * state)
    x, B, C = torch.randn(batch, length, sum(widths), dtype=torch.bfloat16).split(widths, dim=-1)
    x_blhp = x.unflatten(-1, (heads, head_dim))
    B_blgn, C_blgn = B.unflatten(-1, (groups, state)), C.unflatten(-1, (groups, state))
    dt_blh, rate_h = (torch.randn(batch, length, heads) - 2.0).bfloat16(), -8.0 * torch.rand(heads)
    D_h, bias_h = torch.randn(heads), torch.randn(heads)
    y_blhp = run(0, batch, scan)
    expected = run(0, batch, lambda *inputs: scan_in_torch(*(t.float() for t in inputs), 64))
    # bf16 states and weights: two roundings of terms that add up at random, and one of the sum.
    error = (y_blhp.float() - expected).norm() / expected.norm()
    assert error < 4e-3
    assert torch.equal(run(0, batch, scan), y_blhp)
    for sequence in range(batch):
        assert torch.equal(run(sequence, sequence + 1, scan)[0], y_blhp[sequence])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "head_dim"),
    [(1, 24, 4, 2, 16), (3, 100, 4, 4, 64), (2, 517, 16, 2, 128)],
)
def test_attention(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    parts = torch.randn(length, batch, sum(rows), dtype=dtype).split(rows, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    out = attend(q, k, v)
    assert out.is_contiguous()
    assert torch.equal(attend(q, k, v), out)
    repeated = (t.double().repeat_interleave(heads // t.shape[2], 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in repeated), is_causal=True
    )
    error = out.double() - expected.permute(2, 0, 1, 3).flatten(2)
    assert error.norm() / expected.norm() < (1e-5 if dtype is torch.float32 else 6e-3)


def _assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one rounding of the fp32 result; small ones may be sums of larger terms."""
    allowed = ROUNDING[ours.dtype] * (expected.abs() + 0.02 * expected.abs().max())
    assert ((ours.float() - expected).abs() <= allowed).all()
