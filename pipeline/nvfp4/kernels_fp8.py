# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""FP8 on a GPU: store E4M3 codes and measure their errors, or try several amax multipliers.

In: weights [..., N, K], bf16 or fp32, any K, and the fp32 amax [...] of each matrix. Out: the
bytes of `reference.quantize_fp8`, and fp64 sums that agree with the reference's within 1e-6:
squares are summed in fp32 over 8 weights and in fp64 from there on, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4.kernels_blocks import (
    E4M3_FACTOR,
    E4M3_LEADING,
    E4M3_MAX,
    LAUNCH,
    as_matrices,
    e4m3_code,
    quotient,
    reciprocal_of,
    round_ratio,
)
from pipeline.nvfp4.reference import fp8_weight_scale
from pipeline.nvfp4.rows import check_dtype, check_per_matrix

_EIGHTS = 256  # per program; eight bf16 are the 16 bytes that a thread reads at once
_WARPS = 4
_REGISTERS = 64  # per thread
# Weight scales for which no quotient of interest is subnormal and no square over- or underflows.
_ORDINARY_MIN = tl.constexpr(2.0**-40)
_ORDINARY_MAX = tl.constexpr(2.0**50)


def pack_fp8(
    weight: Tensor, tensor_amax: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Store [..., N, K] weights as E4M3 with one scale per matrix, and measure.

    Args:
        weight: bf16 or fp32 [..., N, K], finite.
        tensor_amax: fp32 [...], times the chosen multiplier where the recipe searches one.
        out: Contiguous float8_e4m3fn [..., N, K] to write into.

    Returns:
        Codes float8_e4m3fn [..., N, K], weight_scale fp32 [...], squared_error and
        squared_weight fp64 [...].
    """
    codes = weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn) if out is None else out
    assert codes.shape == weight.shape
    assert codes.is_contiguous()
    weight_scale = fp8_weight_scale(tensor_amax)
    sums = _launch(weight, weight_scale.unsqueeze(-1), codes)
    return codes, weight_scale, sums[..., 0], sums[..., 1]


def fp8_squared_errors(weight: Tensor, tensor_amax: Tensor, multipliers: Sequence[float]) -> Tensor:
    """Return what each amax multiplier would cost, fp64 [..., T], in one pass over the weights."""
    scales = [fp8_weight_scale(tensor_amax * multiplier) for multiplier in multipliers]
    return _launch(weight, torch.stack(scales, -1), None)[..., : len(multipliers)]


def _launch(weight: Tensor, weight_scale: Tensor, codes: Tensor | None) -> Tensor:
    """Try the T scales [..., T] of each matrix; return fp64 [..., T + 1], squared weights last."""
    check_dtype(weight)
    check_per_matrix(weight, weight_scale[..., 0])
    *matrix_dims, n_rows, columns = weight.shape
    matrices = as_matrices(weight)
    n_scales, elements = weight_scale.shape[-1], n_rows * columns
    programs = triton.cdiv(elements, 8 * _EIGHTS)
    sums = matrices.new_zeros((len(matrices), n_scales + 1, programs), dtype=torch.float64)
    if matrices.numel():
        _fp8_kernel[(len(matrices) * programs,)](
            matrices,
            weight_scale.contiguous(),
            matrices if codes is None else codes.view(torch.uint8),
            sums,
            matrices.stride(0),
            elements,
            programs,
            N_SCALES=n_scales,
            STORE=codes is not None,
            EIGHTS=_EIGHTS,
            num_warps=_WARPS,
            maxnreg=_REGISTERS,
            **LAUNCH,
        )
    return sums.sum(-1).view(*matrix_dims, n_scales + 1)


@triton.jit(do_not_specialize=["programs"])
def _fp8_kernel(
    weight_ptr,
    scale_ptr,
    codes_ptr,
    sums_ptr,
    matrix_stride,
    elements,
    programs,
    N_SCALES: tl.constexpr,
    STORE: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    """Grid: `programs` per matrix. Sums are fp64 [E, N_SCALES + 1, programs].

    Dims: X eights of consecutive weights, L the 8 of each. STORE goes with one scale.
    """
    matrix = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    sums_ptr += matrix.to(tl.int64) * programs * (N_SCALES + 1) + part
    first = part.to(tl.int64) * (EIGHTS * 8)
    element_XL = first + tl.arange(0, EIGHTS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    is_weight_XL = element_XL < elements
    weight_ptr += matrix.to(tl.int64) * matrix_stride
    weight_XL = tl.load(weight_ptr + element_XL, mask=is_weight_XL, other=0.0).to(tl.float32)
    magnitude_XL = tl.abs(weight_XL)
    is_ordinary = True
    for index in tl.static_range(N_SCALES):
        scale = tl.load(scale_ptr + matrix * N_SCALES + index)
        is_ordinary = (scale >= _ORDINARY_MIN) & (scale <= _ORDINARY_MAX)
        if is_ordinary:
            value_XL = _round(magnitude_XL, scale, True)
            error = _sum_squares(value_XL * scale - magnitude_XL, True)
        else:
            value_XL = _round(magnitude_XL, scale, False)
            stored_XL = (value_XL * scale).to(tl.float64)
            error = _sum_squares(stored_XL - magnitude_XL.to(tl.float64), False)
        tl.store(sums_ptr + index * programs, error)
        if STORE:
            sign_XL = (weight_XL.to(tl.int32, bitcast=True) >> 24) & 0x80
            code_XL = (e4m3_code(value_XL) | sign_XL).to(tl.uint8)
            codes_ptr += matrix.to(tl.int64) * elements
            tl.store(codes_ptr + element_XL, code_XL, mask=is_weight_XL)
    squares_ptr = sums_ptr + N_SCALES * programs
    if is_ordinary:
        tl.store(squares_ptr, _sum_squares(magnitude_XL, True))
    else:
        tl.store(squares_ptr, _sum_squares(magnitude_XL, False))


@triton.jit
def _round(magnitude_XL, scale, ORDINARY: tl.constexpr):
    """E4M3 values of `magnitude / scale`, saturating; fp32."""
    if ORDINARY:
        # 463 still rounds to 448; without the limit a huge quotient would become Inf - Inf.
        magnitude_XL = tl.minimum(magnitude_XL, scale * 463.0)
    ratio_XL = quotient(magnitude_XL, scale, reciprocal_of(scale), ORDINARY)
    if not ORDINARY:
        ratio_XL = tl.minimum(ratio_XL, E4M3_MAX)
    return round_ratio(ratio_XL, E4M3_LEADING, E4M3_FACTOR)


@triton.jit
def _sum_squares(values_XL, ORDINARY: tl.constexpr):
    """Sum of squares, fp64; in fp64 throughout where fp32 could over- or underflow."""
    if ORDINARY:
        return tl.sum(tl.sum(values_XL * values_XL, axis=1).to(tl.float64), axis=0)
    else:
        values_XL = values_XL.to(tl.float64)
        return tl.sum(tl.sum(values_XL * values_XL, axis=1), axis=0)
