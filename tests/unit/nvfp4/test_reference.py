"""Rules of the reference: hand examples, edge values, invariance under cuts, and refusals."""

import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.nvfp4 import rows
from pipeline.nvfp4.codes import unpack_codes
from pipeline.nvfp4.formats import E2M1_VALUES, Format, WeightMethod
from pipeline.nvfp4.reference import (
    block_amax,
    check_tensor_amax,
    dequantize_nvfp4,
    fp8_squared_errors,
    fp8_weight_scale,
    input_scale,
    kv_scale,
    quantize_fp8,
    quantize_nvfp4,
    tensor_amax,
    weight_scale_2,
)

METHODS = list(WeightMethod)
BF16_MAX = torch.finfo(torch.bfloat16).max


def gaussian(*shape, seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def pack(weight, method, amax=None):
    return quantize_nvfp4(weight, tensor_amax(weight) if amax is None else amax, method)


def assert_bytes(left, right):
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    assert torch.equal(
        left.contiguous()[None].view(torch.uint8), right.contiguous()[None].view(torch.uint8)
    )


def assert_same(left, right):
    assert_bytes(left.codes, right.codes)
    assert_bytes(left.weight_scale, right.weight_scale)
    assert_bytes(left.weight_scale_2, right.weight_scale_2)


def assert_sound(packed):
    """No NaN, Inf or zero in any scale; finite weights."""
    scale = packed.weight_scale.float()
    assert (torch.isfinite(scale) & (scale >= 2**-9)).all()
    assert (torch.isfinite(packed.weight_scale_2) & (packed.weight_scale_2 > 0)).all()
    assert torch.isfinite(dequantize_nvfp4(packed)).all()


def test_hand_example_on_six_and_on_four():
    weight = torch.tensor([[10, 20, 30, 40] + [0] * 12], dtype=torch.bfloat16)
    on_six = pack(weight, WeightMethod.max, torch.tensor(6.0 * 448))
    assert on_six.weight_scale_2 == 1.0
    assert on_six.weight_scale.float().item() == 6.5
    errors = (dequantize_nvfp4(on_six) - weight.float()).square()
    assert errors[0, :4].mean().item() == 4.328125
    best = pack(weight, WeightMethod.four_over_six, torch.tensor(6.0 * 256))
    assert best.weight_scale_2 == 1.0
    assert best.weight_scale.float().item() == 10.0
    assert torch.equal(dequantize_nvfp4(best), weight.float())


def test_weight_scale_2_of_four_over_six_is_larger_by_448_over_256():
    amax = torch.tensor([0.11, 3.5, 700.0])
    ratio = weight_scale_2(amax, WeightMethod.four_over_six) / weight_scale_2(
        amax, WeightMethod.max
    )
    assert torch.allclose(ratio, torch.tensor(1.75), rtol=2e-7, atol=0)


@pytest.mark.parametrize("method", [WeightMethod.mse, WeightMethod.four_over_six])
def test_no_candidate_beats_the_chosen_scale(method):
    """An independent search in fp64, block by block, over scales the method may choose."""
    weight = gaussian(4, 64, seed=5)
    packed = pack(weight, method)
    chosen = (dequantize_nvfp4(packed).double() - weight.double()).view(-1, 16).square().sum(-1)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    magnitudes = weight.double().abs().view(-1, 16)
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    for block, magnitude in enumerate(magnitudes):
        scales = every
        if method is WeightMethod.four_over_six:
            wanted = magnitude.amax() / 6 / packed.weight_scale_2.double() * torch.tensor([1, 1.5])
            scales = wanted.float().to(torch.float8_e4m3fn).double()
        grid = values * (scales * packed.weight_scale_2.double())[:, None]
        nearest = (magnitude[None, :, None] - grid[:, None, :]).abs().amin(-1)
        assert chosen[block] <= nearest.square().sum(-1).amin() * (1 + 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_cuts_and_stacks_do_not_change_a_byte(method):
    weight = gaussian(3, 40, 96, seed=1)
    weight[1, 5] = 0
    amax = tensor_amax(weight)
    whole = pack(weight, method)
    for index in range(3):
        alone = pack(weight[index], method)
        assert_bytes(alone.codes, whole.codes[index])
        assert_bytes(alone.weight_scale, whole.weight_scale[index])
        assert_bytes(alone.weight_scale_2, whole.weight_scale_2[index])
    for cut in (slice(0, 7), slice(7, 8), slice(8, 40)):
        shard = pack(weight[:, cut], method, amax)
        assert_bytes(shard.codes, whole.codes[:, cut])
        assert_bytes(shard.weight_scale, whole.weight_scale[:, cut])
    for first, last in ((0, 16), (16, 80), (80, 96)):
        shard = pack(weight[..., first:last], method, amax)  # not contiguous
        assert_bytes(shard.codes, whole.codes[..., first // 2 : last // 2])
        assert_bytes(shard.weight_scale, whole.weight_scale[..., first // 16 : last // 16])
    nested = pack(weight.view(3, 1, 40, 96), method)
    assert_bytes(nested.codes.squeeze(1), whole.codes)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_strides_and_dtype_do_not_change_a_byte(method, monkeypatch):
    weight = gaussian(2, 24, 64, seed=2)
    whole = pack(weight, method)
    assert_same(pack(weight.float(), method), whole)
    transposed = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_same(pack(transposed, method), whole)
    assert_same(pack(torch.nn.Parameter(weight), method), whole)
    values = dequantize_nvfp4(whole)
    monkeypatch.setattr(rows, "CPU_CHUNK_ELEMENTS", 5 * 64)  # chunks that cross matrices
    assert_same(pack(weight, method), whole)
    assert torch.equal(dequantize_nvfp4(whole), values)


@pytest.mark.parametrize("method", METHODS)
def test_all_zero_tensor_is_stored_as_exact_zeros(method):
    for weight in (torch.zeros(2, 3, 32), -torch.zeros(3, 32, dtype=torch.bfloat16)):
        packed = pack(weight, method)
        assert_sound(packed)
        assert not packed.codes.any()
        assert not dequantize_nvfp4(packed).any()
        assert not torch.signbit(dequantize_nvfp4(packed)).any()


@pytest.mark.parametrize(
    ("method", "scale"),
    [("max", 448.0), ("max_dynamic", 1.0), ("four_over_six", 448.0), ("mse", 2.0**-9)],
)
def test_all_zero_block_gets_the_scale_of_one(method, scale):
    weight = gaussian(2, 32, seed=3)
    weight[0, 16:] = 0
    packed = pack(weight, WeightMethod(method))
    assert packed.weight_scale[0, 1].float().item() == scale
    assert not packed.codes[0, 8:].any()
    if method == "max":  # less than 448 where the tensor is large
        large = pack(weight * 1e6, WeightMethod.max)
        expected = torch.tensor(448.0) / (tensor_amax(weight * 1e6) / 6)
        assert large.weight_scale[0, 1].float() == expected.to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("method", METHODS)
def test_signs_of_zero_and_of_small_negatives(method):
    weight = torch.zeros(1, 16, dtype=torch.bfloat16)
    weight[0, :4] = torch.tensor([6.0, -1e-6, -0.0, -6.0])
    codes = unpack_codes(pack(weight, method).codes)
    assert codes[0, :4].tolist() == [7, 8, 0, 15]
    assert not codes[0, 4:].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "value", [BF16_MAX, 1e38, 1e19, 1e-30, 1e-38, 2.0**-133, 2.0**-149, 3.0e-41]
)
def test_huge_and_tiny_tensors_have_sound_scales(method, value):
    weight = torch.full((2, 32), value)
    weight[0, ::2] *= -0.5
    weight[1, :16] = 0
    assert_sound(pack(weight, method))
    mixed = gaussian(4, 32).float()
    mixed[2, 3] = value
    assert_sound(pack(mixed, method))
    codes, scale = quantize_fp8(weight, tensor_amax(weight) * 1.5)
    assert torch.isfinite(codes.float()).all()
    assert torch.isfinite(scale)
    assert scale > 0
    assert torch.isfinite(fp8_squared_errors(weight, tensor_amax(weight), (1.0, 1.5))).all()


def test_block_amax_and_tensor_amax():
    weight = gaussian(2, 5, 48, seed=4)
    expected = weight.float().abs().view(2, 5, 3, 16).amax(-1)
    assert torch.equal(block_amax(weight), expected)
    assert torch.equal(tensor_amax(weight), expected.amax((-2, -1)))
    assert tensor_amax(weight).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_without_experts(method):
    weight = torch.empty(0, 8, 32, dtype=torch.bfloat16)
    packed = pack(weight, method)
    assert packed.codes.shape == (0, 8, 16)
    assert packed.weight_scale.shape == (0, 8, 2)
    assert dequantize_nvfp4(packed).shape == (0, 8, 32)
    assert fp8_squared_errors(weight, tensor_amax(weight), (1.0, 1.5)).shape == (0, 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused_by_index(bad):
    weight = gaussian(4, 8, 32)
    check_tensor_amax(tensor_amax(weight), "up_proj")
    weight[2, 7, 31] = bad
    with pytest.raises(NumericsError, match=r"up_proj \[2\]: found NaN or Inf; every weight must"):
        check_tensor_amax(tensor_amax(weight), "up_proj")
    with pytest.raises(NumericsError, match=r"^in_proj: found NaN or Inf"):
        check_tensor_amax(tensor_amax(weight[2]), "in_proj")
    with pytest.raises(NumericsError, match=r"\[0, 1, 2, 3, 4, 5, 6, 7 and 2 more\]"):
        check_tensor_amax(torch.full((10,), bad), "experts")


def test_shape_and_dtype_are_checked():
    amax = torch.tensor(1.0)
    with pytest.raises(NumericsError, match=r"shape \[8, 24\].*K a multiple of 16.*fewer shards"):
        quantize_nvfp4(torch.zeros(8, 24), amax, WeightMethod.max)
    with pytest.raises(NumericsError, match=r"found float16; weights must be bfloat16"):
        quantize_nvfp4(torch.zeros(8, 32, dtype=torch.float16), amax, WeightMethod.max)
    with pytest.raises(NumericsError, match=r"found float64"):
        quantize_fp8(torch.zeros(8, 32, dtype=torch.float64), amax)
    with pytest.raises(NumericsError, match=r"tensor_amax.*found shape \[\].*of shape \[2\]"):
        quantize_nvfp4(torch.zeros(2, 8, 32), amax, WeightMethod.max)


def test_fp8_saturates_and_does_not_depend_on_cuts():
    weight = gaussian(3, 20, 50, seed=6)
    codes, scale = quantize_fp8(weight, tensor_amax(weight))
    assert codes.float().abs().amax() == 448
    assert torch.equal(scale, fp8_weight_scale(tensor_amax(weight)))
    shard, _ = quantize_fp8(weight[:, 3:9, 7:30], tensor_amax(weight))
    assert_bytes(shard, codes[:, 3:9, 7:30])
    small, _ = quantize_fp8(weight, tensor_amax(weight) / 4)  # beyond 448: not NaN
    assert small.float().abs().amax() == 448
    zero_codes, zero_scale = quantize_fp8(torch.zeros(2, 4), torch.tensor(0.0))
    assert not zero_codes.float().any()
    assert zero_scale > 0


def test_fp8_errors_add_up_over_shards_and_match_the_codes():
    weight = gaussian(2, 16, 64, seed=7)
    amax, multipliers = tensor_amax(weight), (1.0, 1.5, 2.0)
    errors = fp8_squared_errors(weight, amax, multipliers)
    assert errors.dtype == torch.float64
    shards = [fp8_squared_errors(s, amax, multipliers) for s in weight.split((24, 40), dim=-1)]
    assert torch.allclose(sum(shards), errors, rtol=1e-13, atol=0)
    for index, multiplier in enumerate(multipliers):
        codes, scale = quantize_fp8(weight, amax * multiplier)
        stored = codes.float() * scale[:, None, None]
        expected = (stored.double() - weight.double()).square().sum((-2, -1))
        assert torch.allclose(errors[:, index], expected, rtol=1e-13, atol=0)


def test_activation_scales():
    amax = torch.tensor(44.8)
    assert input_scale(amax, Format.fp8).item() == pytest.approx(0.1, rel=1e-6)
    assert input_scale(amax, Format.nvfp4).item() == pytest.approx(0.1 / 6, rel=1e-6)
    assert kv_scale(amax).item() == 1.0
    assert kv_scale(amax, clamp=False).item() == pytest.approx(0.1, rel=1e-6)
    assert kv_scale(torch.tensor(896.0)).item() == 2.0


def test_activation_amax_of_zero_or_nan_is_refused():
    with pytest.raises(NumericsError, match=r"layers\.3.*no token reached.*unobserved_input_scale"):
        input_scale(torch.tensor(0.0), Format.nvfp4, "layers.3.mixer.experts.down_proj")
    with pytest.raises(NumericsError, match="activations must be finite"):
        input_scale(torch.tensor(torch.inf), Format.fp8)
    with pytest.raises(NumericsError, match="KV cache"):
        kv_scale(torch.tensor(torch.nan))
