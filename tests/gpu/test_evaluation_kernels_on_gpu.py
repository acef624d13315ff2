"""What the evaluation computes on a GPU besides the layers: sums, weights in their slot, logits."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.evaluation.fidelity import Head
from pipeline.nvfp4.activations import sum_squares
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import WeightMethod

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=GPU).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 3, 77), (64, 2, 2049), (2048, 4, 8192), (3, 2, 2688), (0, 2, 64)]
)
def test_squares(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, other = _random(*shape, dtype=dtype), _random(*shape, seed=1, dtype=dtype)
    weights = torch.ones(shape[1], device=GPU)
    weights[1:2] = 0
    near = (x.float() + 1e-3 * other.float()).to(dtype)
    for scale in (1.0, 1e15, 1e-15):
        for subtracted in (None, other * scale, near * scale):
            expected = sum_squares(x * scale, weights, "reference", subtracted)
            found = sum_squares(x * scale, weights, "triton", subtracted)
            assert (found.dtype, found.shape) == (torch.float64, ())
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
            assert sum_squares(x * scale, weights, "triton", subtracted).equal(found)
    assert sum_squares(x, weights, "triton", x) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_squares_of_what_is_not_finite(bad: float) -> None:
    x, weights = _random(40, 3, 640), torch.ones(3, device=GPU)
    x[17, 2, 333] = bad
    assert not sum_squares(x, weights, "triton").isfinite()
    assert not sum_squares(x, weights, "triton", _random(40, 3, 640)).isfinite()


def test_squares_of_more_elements_than_32_bits_count() -> None:
    x = torch.ones(2**18 + 1, 2, 2**13, dtype=torch.bfloat16, device=GPU)
    weights = torch.tensor([1.0, 0.5], device=GPU)
    assert sum_squares(x, weights, "triton") == 1.5 * x[:, 0].numel()
    assert sum_squares(x, weights, "triton", x) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 96, 1344), (1, 640, 4096)])
def test_weights_are_replaced_where_they_lie(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    triton, reference = get_backend("triton"), get_backend("reference")
    weight = _random(*shape, dtype=torch.bfloat16)
    weight *= torch.logspace(-8, 0, shape[1], device=GPU)[:, None]
    slot = torch.full((shape[0] + 2, *shape[1:]), 7.0, dtype=dtype, device=GPU)
    part = slot[1:-1]
    part.copy_(weight)
    packed = triton.quantize_nvfp4(part, triton.tensor_amax(part), WeightMethod.max)
    assert triton.dequantize_nvfp4(packed, dtype, part).data_ptr() == part.data_ptr()
    expected = reference.dequantize_nvfp4(packed, dtype)
    assert part.view(torch.uint8).equal(expected.view(torch.uint8))
    part[part == 0] = 3.0  # what was zero already must become zero too
    expected = part.clone()
    reference.zero_flushed(expected, packed.weight_scale)
    triton.zero_flushed(part, packed.weight_scale)
    assert part.view(torch.uint8).equal(expected.view(torch.uint8))
    if shape[1] > 16:
        assert (expected == 0).any()
    assert (expected != 0).any()
    assert slot[[0, -1]].eq(7).all()


def test_every_block_scale_is_flushed_or_kept() -> None:
    scales = torch.arange(1, 127, dtype=torch.uint8, device=GPU).repeat(17)[:, None]
    scales = scales.view(torch.float8_e4m3fn)
    weight = torch.full((len(scales), 16), torch.nan, dtype=torch.bfloat16, device=GPU)
    get_backend("triton").zero_flushed(weight, scales)
    kept = scales.float() >= 2.0**-6
    assert weight.isnan().equal(kept.expand(-1, 16))
    assert weight.nan_to_num(0.0).eq(0).all()


@pytest.mark.parametrize("vocab", [1000, 40001])
@pytest.mark.parametrize("hidden", [64, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_fp64(dtype: torch.dtype, hidden: int, vocab: int) -> None:
    states = 30 * _random(300, hidden, dtype=dtype)
    norm, weight = _random(hidden, seed=1).abs() + 0.5, _random(vocab, hidden, seed=2) / hidden**0.5
    found = Head(norm, weight, 1e-5).log_probabilities(states)
    assert found.dtype is torch.float32
    x = F.rms_norm(states.double(), (hidden,), norm.double(), 1e-5)
    logits = x @ weight.double().T
    difference = found.double() - logits.log_softmax(-1)
    assert difference.norm() < 5e-5 * logits.norm()
    # A head in FP32 is multiplied as it is.
    plain = Head(norm, weight.float(), 1e-5).log_probabilities(states)
    assert (plain.double() - logits.log_softmax(-1)).norm() < 5e-5 * logits.norm()
