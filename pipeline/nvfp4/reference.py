"""The truth about every weight byte and scale, in plain torch; kernels must match it byte for byte.

In: weights [..., N, K] (bf16, or fp32 holding bf16 values) with any leading batch dims, and
`tensor_amax` [...], the fp32 amax of each *whole logical tensor*, which is larger than the amax of
the weights at hand when these are a shard or when a server fuses the tensor with others.
Out: packed codes and scales. Every value depends on its own block of 16 and on `tensor_amax` alone,
so a tensor may be given whole, in shards (rows anywhere, K at multiples of 16) or stacked.

Four things decide the last bit. Arithmetic is fp32. Dividing by a constant is multiplying by its
fp32 reciprocal, dividing by a tensor is a true division. Products and sums are rounded one by one:
a kernel must not fuse them into multiply-adds. The 16 squared errors of a block are added in
adjacent pairs, `_sum_block`, whatever the shape or the device.

Limits: squared errors overflow fp32 where an amax passes about 1e18. Candidates are then
indistinguishable and the first one stands; scales stay finite and positive.
Non-finite weights are the caller's to refuse, once, by `check_tensor_amax`.

Dims: R rows (all batch dims and N together), B blocks, L the 16 lanes of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import NumericsError
from pipeline.nvfp4.codes import (
    decode_e2m1,
    encode_e2m1,
    pack_codes,
    positive_e4m3_values,
    round_to_e2m1,
)
from pipeline.nvfp4.formats import (
    BLOCK_SIZE,
    E4M3_MAX,
    E4M3_MIN,
    FOUR_OVER_SIX_MULTIPLIER,
    FP32_MAX,
    FP32_TINY,
    RECIPROCAL_6,
    RECIPROCAL_6_256,
    RECIPROCAL_6_448,
    RECIPROCAL_448,
    Format,
    WeightMethod,
    normalization_max,
)
from pipeline.nvfp4.rows import as_rows, check_dtype, check_weight, row_chunks, to_lanes


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """An NVFP4 weight, as a checkpoint stores it.

    Attributes:
        codes: uint8 [..., N, K/2], two E2M1 codes per byte.
        weight_scale: float8_e4m3fn [..., N, K/16], one scale per block.
        weight_scale_2: fp32 [...], one scale per tensor.
    """

    codes: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor


def block_amax(weight: Tensor) -> Tensor:
    """Return the amax of each block, fp32 [..., N, K/16]; NaN and Inf pass through."""
    check_weight(weight)
    blocks = weight.detach().view(*weight.shape[:-1], weight.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    return torch.maximum(blocks.amax(-1), -blocks.amin(-1)).float()


def tensor_amax(weight: Tensor) -> Tensor:
    """Return the amax of each matrix at hand, fp32 [...]; NaN and Inf pass through."""
    weight = weight.detach()
    return torch.maximum(weight.amax((-2, -1)), -weight.amin((-2, -1))).float()


def check_tensor_amax(tensor_amax: Tensor, name: str) -> None:
    """Raise NumericsError if an amax is NaN or Inf, naming the matrices of a stack by index.

    An amax is finite exactly if all the weights under it are, so this is the cheap check of a
    whole tensor. Call it before reducing over ranks: a MAX reduction may drop a NaN.
    """
    if bool(torch.isfinite(tensor_amax).all()):
        return
    bad = torch.nonzero(~torch.isfinite(tensor_amax)).tolist()
    where = ", ".join(str(index[0] if len(index) == 1 else tuple(index)) for index in bad[:8])
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    raise NumericsError(
        f"{name} [{where}{more}]" if tensor_amax.ndim else name,
        value="NaN or Inf",
        rule="every weight must be finite",
        remedy="replace the source checkpoint; its weights are corrupt",
    )


def weight_scale_2(tensor_amax: Tensor, method: WeightMethod) -> Tensor:
    """Return `g * fp32(1 / (6 m))`, fp32 [...]; positive and finite for every finite amax."""
    four_over_six = method is WeightMethod.four_over_six
    reciprocal = RECIPROCAL_6_256 if four_over_six else RECIPROCAL_6_448
    return (_stored_amax(tensor_amax) * reciprocal).clamp(min=FP32_TINY)


def quantize_nvfp4(weight: Tensor, tensor_amax: Tensor, method: WeightMethod) -> PackedWeight:
    """Choose the block scales of [..., N, K] weights by `method` and pack the weights.

    Args:
        weight: bf16 or fp32 [..., N, K], finite.
        tensor_amax: fp32 [...], on the same device.
        method: How block scales are chosen.

    Raises:
        NumericsError: The dtype is not bf16 or fp32, or K is not a multiple of 16.
    """
    check_weight(weight)
    *matrix_dims, columns = weight.shape
    tensor_scale = weight_scale_2(tensor_amax, method)
    rows_RK, amax_R, tensor_scale_R = as_rows(weight, tensor_amax, tensor_scale)
    codes_RC = rows_RK.new_empty((len(rows_RK), columns // 2), dtype=torch.uint8)
    scales_RB = rows_RK.new_empty((len(rows_RK), columns // BLOCK_SIZE), dtype=torch.float8_e4m3fn)
    for chunk in row_chunks(rows_RK):
        lanes_LB = to_lanes(rows_RK[chunk])
        per_row = columns // BLOCK_SIZE
        tensor_scale_B = tensor_scale_R[chunk].repeat_interleave(per_row)
        amax_B = amax_R[chunk].repeat_interleave(per_row)
        scale_B = _choose_block_scales(lanes_LB.abs(), amax_B, tensor_scale_B, method)
        codes_LB = _encode_blocks(lanes_LB, scale_B.float() * tensor_scale_B)
        codes_RC[chunk] = pack_codes(codes_LB.t()).reshape(-1, columns // 2)
        scales_RB[chunk] = scale_B.view(-1, per_row)
    return PackedWeight(
        codes_RC.view(*matrix_dims, columns // 2),
        scales_RB.view(*matrix_dims, columns // BLOCK_SIZE),
        tensor_scale,
    )


def dequantize_nvfp4(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights [..., N, K] that a packed weight stands for.

    `E2M1 value * (weight_scale * weight_scale_2)` in fp32; float32 is exact, another dtype is
    rounded once, at the end.
    """
    codes_RC, tensor_scale_R = as_rows(packed.codes, packed.weight_scale_2)
    scales_RB = packed.weight_scale.flatten(0, -2)
    columns = 2 * codes_RC.shape[1]
    weight_RK = tensor_scale_R.new_empty((len(codes_RC), columns), dtype=dtype)
    for chunk in row_chunks(weight_RK):
        scale_RB = scales_RB[chunk].float() * tensor_scale_R[chunk, None]
        values_RBL = decode_e2m1(codes_RC[chunk]).view(*scale_RB.shape, BLOCK_SIZE)
        weight_RK[chunk] = (values_RBL * scale_RB.unsqueeze(-1)).flatten(-2)
    return weight_RK.view(*packed.codes.shape[:-1], columns)


def fp8_weight_scale(tensor_amax: Tensor) -> Tensor:
    """Return `g * fp32(1/448)`, fp32 [...]; positive and finite, for an all-zero tensor too."""
    amax = _stored_amax(tensor_amax).clamp(max=FP32_MAX)
    return (amax * RECIPROCAL_448).clamp(min=FP32_TINY)


def quantize_fp8(weight: Tensor, tensor_amax: Tensor) -> tuple[Tensor, Tensor]:
    """Store [..., N, K] weights as E4M3, saturating, with one scale per tensor.

    Args:
        weight: bf16 or fp32 [..., N, K], finite; any K.
        tensor_amax: fp32 [...], times the chosen multiplier where the recipe searches one.

    Returns:
        Codes float8_e4m3fn [..., N, K] and weight_scale fp32 [...].

    Raises:
        NumericsError: The dtype is not bf16 or fp32.
    """
    check_dtype(weight)
    weight_scale = fp8_weight_scale(tensor_amax)
    rows_RK, weight_scale_R = as_rows(weight, weight_scale)
    codes_RK = torch.empty_like(rows_RK, dtype=torch.float8_e4m3fn)
    for chunk in row_chunks(rows_RK):
        codes_RK[chunk] = encode_fp8(rows_RK[chunk], weight_scale_R[chunk, None])
    return codes_RK.view(weight.shape), weight_scale


def encode_fp8(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return `E4M3_RNE(weight / weight_scale)`, saturating at 448 (torch's cast gives NaN)."""
    return (weight.float() / weight_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def fp8_squared_errors(weight: Tensor, tensor_amax: Tensor, multipliers: Sequence[float]) -> Tensor:
    """Return what each amax multiplier would cost, as fp64 sums [..., T] of squared errors.

    They add up over the shards of a tensor; the least total wins, the first on a tie.
    """
    check_dtype(weight)
    weight_scales = [fp8_weight_scale(tensor_amax * multiplier) for multiplier in multipliers]
    rows_RK, *weight_scales_R = as_rows(weight, *weight_scales)
    errors_RT = rows_RK.new_empty((len(rows_RK), len(multipliers)), dtype=torch.float64)
    for chunk in row_chunks(rows_RK):
        for index, weight_scale_R in enumerate(weight_scales_R):
            scale_R1 = weight_scale_R[chunk, None]
            stored_RK = encode_fp8(rows_RK[chunk], scale_R1).float() * scale_R1
            difference_RK = stored_RK.double() - rows_RK[chunk].double()
            errors_RT[chunk, index] = difference_RK.square().sum(-1)
    return errors_RT.view(*weight.shape[:-1], len(multipliers)).sum(-2)


def input_scale(amax: Tensor, input_format: Format, name: str = "input") -> Tensor:
    """Return the scale of a linear's inputs, fp32, from the amax observed over all tokens.

    Raises:
        NumericsError: An amax is NaN, Inf or zero: no token reached `name`, or all gave zeros.
    """
    _check_observed(amax, name)
    reciprocal = RECIPROCAL_6_448 if input_format is Format.nvfp4 else RECIPROCAL_448
    return (amax.float() * reciprocal).clamp(min=FP32_TINY)


def kv_scale(amax: Tensor, clamp: bool = True, name: str = "KV cache") -> Tensor:
    """Return k_scale or v_scale of the FP8 KV cache, fp32.

    Args:
        amax: Observed amax of keys or values.
        clamp: Never below 1.0, as Model Optimizer's Megatron exporter has it.
        name: What to call it in an error.

    Raises:
        NumericsError: An amax is NaN, Inf or zero.
    """
    _check_observed(amax, name)
    scale = amax.float() * RECIPROCAL_448
    return scale.clamp(min=1.0) if clamp else scale.clamp(min=FP32_TINY)


def scale_from_amax(
    amax_B: Tensor, tensor_amax_B: Tensor, method: WeightMethod, multiplier: float = 1.0
) -> Tensor:
    """Return `E4M3_RNE(clamp((a t / 6) m / (g / 6), 2**-9, 448))`, the scales of blocks.

    A block whose `a t / 6` is zero gets 1 instead of it. An amax near the largest fp32 may
    overflow on the way; it ends at 448.
    """
    scale_B = (amax_B * multiplier) * RECIPROCAL_6
    scale_B = torch.where(scale_B == 0, 1.0, scale_B)
    limit_B = _stored_amax(tensor_amax_B) * RECIPROCAL_6
    return _round_to_e4m3(scale_B * normalization_max(method) / limit_B)


def _choose_block_scales(
    magnitude_LB: Tensor, tensor_amax_B: Tensor, tensor_scale_B: Tensor, method: WeightMethod
) -> Tensor:
    """Return the scale of each block, float8_e4m3fn [B]."""
    if method is WeightMethod.mse:
        return _sweep_scales(magnitude_LB, tensor_scale_B)
    amax_B = magnitude_LB.amax(0)
    if method is WeightMethod.max_dynamic:
        scale_B = amax_B / (6.0 * tensor_scale_B)
        return _round_to_e4m3(torch.where(scale_B == 0, 1.0, scale_B))
    on_six_B = scale_from_amax(amax_B, tensor_amax_B, method)
    if method is WeightMethod.max:
        return on_six_B
    on_four_B = scale_from_amax(amax_B, tensor_amax_B, method, FOUR_OVER_SIX_MULTIPLIER)
    error_on_six_B = _squared_errors(magnitude_LB, on_six_B.float() * tensor_scale_B)
    error_on_four_B = _squared_errors(magnitude_LB, on_four_B.float() * tensor_scale_B)
    four_wins_B = error_on_four_B < error_on_six_B
    chosen_B = torch.where(four_wins_B, on_four_B.view(torch.uint8), on_six_B.view(torch.uint8))
    return chosen_B.view(torch.float8_e4m3fn)


def _sweep_scales(magnitude_LB: Tensor, tensor_scale_B: Tensor) -> Tensor:
    """Try all positive E4M3 values, ascending; only a strictly smaller error replaces the best."""
    candidates = positive_e4m3_values(magnitude_LB.device).float()
    best_error_B = torch.full_like(tensor_scale_B, torch.inf)
    best_byte_B = torch.ones_like(tensor_scale_B, dtype=torch.uint8)
    for byte, candidate in enumerate(candidates, start=1):
        error_B = _squared_errors(magnitude_LB, candidate * tensor_scale_B)
        wins_B = error_B < best_error_B
        best_error_B = torch.where(wins_B, error_B, best_error_B)
        best_byte_B.masked_fill_(wins_B, byte)
    return best_byte_B.view(torch.float8_e4m3fn)


def _squared_errors(magnitude_LB: Tensor, scale_B: Tensor) -> Tensor:
    """Return the sum over each block of `(E2M1 value * scale - |w|)**2`, fp32 [B]."""
    error_LB = round_to_e2m1(magnitude_LB / scale_B).mul_(scale_B).sub_(magnitude_LB)
    return _sum_block(error_LB.mul_(error_LB))


def _sum_block(values_LB: Tensor) -> Tensor:
    """Add the 16 lanes in adjacent pairs: ((0+1)+(2+3))+((4+5)+(6+7)) and so on, fp32 [B]."""
    while len(values_LB) > 1:
        values_LB = values_LB[0::2] + values_LB[1::2]
    return values_LB[0]


def _encode_blocks(lanes_LB: Tensor, scale_B: Tensor) -> Tensor:
    """Return uint8 codes [16, B]; a scale that underflowed to zero gives magnitude 0."""
    magnitude_LB = torch.where(scale_B > 0, lanes_LB.abs() / scale_B, 0.0)
    return encode_e2m1(magnitude_LB, lanes_LB < 0)


def _round_to_e4m3(scale_B: Tensor) -> Tensor:
    return scale_B.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def _stored_amax(tensor_amax: Tensor) -> Tensor:
    """Return the amax that scales are made of: an all-zero tensor is stored as if it were 1.0."""
    return torch.where(tensor_amax == 0, 1.0, tensor_amax)


def _check_observed(amax: Tensor, name: str) -> None:
    if not bool(torch.isfinite(amax).all()):
        raise NumericsError(
            f"amax of {name}",
            value=amax.tolist(),
            rule="activations must be finite",
            remedy="check the weights of the layers before it, or compute in float32",
        )
    if bool((amax <= 0).any()):
        raise NumericsError(
            f"amax of {name}",
            value=amax.tolist(),
            rule="an activation scale must be positive; no token reached it or all gave zeros",
            remedy="calibrate with more text, or give unobserved_input_scale explicitly",
        )
