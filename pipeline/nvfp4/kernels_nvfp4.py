# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""NVFP4 on a GPU: choose block scales, pack and measure a whole stack in one launch.

In: weights [..., N, K], bf16 or fp32, and the fp32 amax [...] of each matrix. Out: the bytes of
`reference.quantize_nvfp4` and the sums of `statistics.measure_statistics`. A program takes
some tiles of blocks, one block per thread: it reads each weight once, keeps what it needs in
registers, and writes codes, scales and six partial sums, which are then added in a fixed order.

Errors of blocks are summed in fp32 inside a block and in fp64 over blocks: relative to the
reference's fp64 they are within 1e-6 (where a mean squared error is below 1e-14 of amax**2, fp32
squares underflow and less is exact). Counts are equal. `tensor_amax` must not be below the
weights' own amax for the sums to be finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4 import formats
from pipeline.nvfp4.formats import BLOCK_SIZE, WeightMethod
from pipeline.nvfp4.kernels_blocks import (
    E4M3_MAX,
    LAUNCH,
    as_matrices,
    as_words,
    divide_and_round,
    e4m3_code,
    is_ordinary,
    lanes_of,
    load_words,
    max_block,
    pack_codes,
    per_lane,
    stored_amax,
    sum_squares,
)
from pipeline.nvfp4.kernels_scales import (
    FOUR_OVER_SIX,
    METHOD_CODES,
    choose_scales,
    scale_on_six,
)
from pipeline.nvfp4.reference import PackedWeight, weight_scale_2
from pipeline.nvfp4.rows import check_per_matrix, check_weight
from pipeline.nvfp4.statistics import SEARCHING_METHODS, WeightStatistics

_HOPPER_FLUSH_BELOW = tl.constexpr(formats.HOPPER_FLUSH_BELOW)
_SUMS = tl.constexpr(6)


class _Launch(NamedTuple):
    """Fixed sizes of a launch: another tile would add in another order."""

    blocks: int  # per tile, one per thread
    warps: int
    tiles: int  # per program
    registers: int  # per thread; at these numbers only the path of extreme amax spills


_LAUNCH = _Launch(blocks=128, warps=4, tiles=32, registers=80)
# The sweep tries as many candidates as the neediest block of a tile: its tiles are single warps.
_SWEEP_LAUNCH = _Launch(blocks=32, warps=1, tiles=16, registers=72)


def pack_nvfp4(
    weight: Tensor,
    tensor_amax: Tensor,
    method: WeightMethod,
    *,
    compare_to_max: bool = False,
    out: PackedWeight | None = None,
) -> tuple[PackedWeight, WeightStatistics]:
    """Choose, pack and measure [..., N, K] weights; nothing waits for the device.

    Args:
        weight: bf16 or fp32 [..., N, K], finite. Matrices that are not contiguous are copied.
        tensor_amax: fp32 [...], on the same device.
        method: How block scales are chosen.
        compare_to_max: Also measure the error of method `max`; else `squared_error_of_max` is
            the method's own error.
        out: Contiguous tensors of the result's shapes and dtypes to write into; codes must start
            at a multiple of 8 bytes.

    Raises:
        NumericsError: The dtype is not bf16 or fp32, K is not a multiple of 16, or the amax has
            another shape.
    """
    check_weight(weight)
    check_per_matrix(weight, tensor_amax)
    *matrix_dims, n_rows, columns = weight.shape
    packed = out if out is not None else empty_packed(weight)
    assert packed.codes.shape == (*matrix_dims, n_rows, columns // 2)
    assert packed.weight_scale.shape == (*matrix_dims, n_rows, columns // BLOCK_SIZE)
    for part in (packed.codes, packed.weight_scale, packed.weight_scale_2):
        assert part.is_contiguous()
    packed.weight_scale_2.copy_(weight_scale_2(tensor_amax, method))
    matrices = as_matrices(weight)
    n_matrices, blocks_per_matrix = len(matrices), matrices.shape[1] // BLOCK_SIZE
    launch = _SWEEP_LAUNCH if method is WeightMethod.mse else _LAUNCH
    programs = triton.cdiv(blocks_per_matrix, launch.blocks * launch.tiles)
    sums = matrices.new_empty((n_matrices, 6, programs), dtype=torch.float64)
    compare = compare_to_max and method in SEARCHING_METHODS
    if n_matrices * programs:
        _pack_kernel[(n_matrices * programs,)](
            as_words(matrices),
            tensor_amax.contiguous(),
            packed.weight_scale_2,
            weight_scale_2(tensor_amax, WeightMethod.max),
            packed.codes.view(torch.int64),
            packed.weight_scale.view(torch.uint8),
            sums,
            matrices.stride(0) // BLOCK_SIZE,
            blocks_per_matrix,
            programs,
            METHOD=METHOD_CODES[method],
            COMPARE=compare,
            BLOCKS=launch.blocks,
            TILES=launch.tiles,
            num_warps=launch.warps,
            maxnreg=launch.registers,
            **LAUNCH,
        )
    return packed, _statistics(sums.sum(-1).view(*matrix_dims, 6), blocks_per_matrix, compare)


def empty_packed(weight: Tensor) -> PackedWeight:
    """Allocate what [..., N, K] weights are packed into."""
    *matrix_dims, n_rows, columns = weight.shape
    blocks = columns // BLOCK_SIZE
    return PackedWeight(
        weight.new_empty((*matrix_dims, n_rows, columns // 2), dtype=torch.uint8),
        weight.new_empty((*matrix_dims, n_rows, blocks), dtype=torch.float8_e4m3fn),
        weight.new_empty(matrix_dims, dtype=torch.float32),
    )


def _statistics(sums: Tensor, blocks_per_matrix: int, compare: bool) -> WeightStatistics:
    """Name the sums [..., 6] that `_pack_kernel` writes."""
    error, weight, of_max, zero, m4, flushed = sums.unbind(-1)
    return WeightStatistics(
        squared_error=error,
        squared_weight=weight,
        blocks=torch.full_like(zero, blocks_per_matrix, dtype=torch.int64),
        zero_blocks=zero.long(),
        blocks_m4=m4.long(),
        blocks_flushed=flushed.long(),
        squared_error_of_max=of_max if compare else error,
    )


@triton.jit(
    do_not_specialize=["matrix_stride", "blocks_per_matrix", "programs"],
    # A chunk of a layer's experts begins anywhere: no second kernel for that.
    do_not_specialize_on_alignment=["amax_ptr", "tensor_scale_ptr", "scale_of_max_ptr"],
)
def _pack_kernel(
    weight_ptr,
    amax_ptr,
    tensor_scale_ptr,
    scale_of_max_ptr,
    codes_ptr,
    scales_ptr,
    sums_ptr,
    matrix_stride,
    blocks_per_matrix,
    programs,
    METHOD: tl.constexpr,
    COMPARE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid: `programs` per matrix. The stride counts blocks; sums are fp64 [E, 6, programs]."""
    matrix = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    # bf16 come as int32 pairs, 8 to a block.
    PER_BLOCK: tl.constexpr = 8 if weight_ptr.dtype.element_ty == tl.int32 else 16
    weight_ptr += matrix.to(tl.int64) * matrix_stride * PER_BLOCK
    codes_ptr += matrix.to(tl.int64) * blocks_per_matrix
    scales_ptr += matrix.to(tl.int64) * blocks_per_matrix
    sums_ptr += matrix.to(tl.int64) * programs * _SUMS + part
    amax = stored_amax(tl.load(amax_ptr + matrix))
    tensor_scale = tl.load(tensor_scale_ptr + matrix)
    scale_of_max = tl.load(scale_of_max_ptr + matrix)
    first = part * (BLOCKS * TILES)
    n_tiles = tl.minimum(tl.cdiv(blocks_per_matrix - first, BLOCKS), TILES)
    if is_ordinary(amax):
        _pack_tiles(
            *(weight_ptr, codes_ptr, scales_ptr, sums_ptr, amax, tensor_scale, scale_of_max),
            *(first, n_tiles, blocks_per_matrix, programs, METHOD, COMPARE, True, BLOCKS),
        )
    else:
        _pack_tiles(
            *(weight_ptr, codes_ptr, scales_ptr, sums_ptr, amax, tensor_scale, scale_of_max),
            *(first, n_tiles, blocks_per_matrix, programs, METHOD, COMPARE, False, BLOCKS),
        )


@triton.jit
def _pack_tiles(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    sums_ptr,
    amax,
    tensor_scale,
    scale_of_max,
    first,
    n_tiles,
    blocks_per_matrix,
    programs,
    METHOD: tl.constexpr,
    COMPARE: tl.constexpr,
    ORDINARY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Pack and measure the tiles of one program."""
    error_B = tl.zeros((BLOCKS,), tl.float64)
    weight_B = tl.zeros((BLOCKS,), tl.float64)
    of_max_B = tl.zeros((BLOCKS,), tl.float64)
    zero_B = tl.zeros((BLOCKS,), tl.int32)
    m4_B = tl.zeros((BLOCKS,), tl.int32)
    flushed_B = tl.zeros((BLOCKS,), tl.int32)
    block_B = first + tl.arange(0, BLOCKS)
    is_block_B = block_B < blocks_per_matrix
    next_words = load_words(weight_ptr, first, is_block_B, BLOCKS)
    for tile in range(n_tiles):
        lanes = lanes_of(next_words)
        # The next tile is on its way while this one is computed.
        block = first + (tile + 1) * BLOCKS
        next_block_B = block + tl.arange(0, BLOCKS)
        is_next_B = (next_block_B < blocks_per_matrix) & (tile + 1 < n_tiles)
        next_words = load_words(weight_ptr, block, is_next_B, BLOCKS)
        magnitude = tl.abs(lanes)
        amax_B = max_block(magnitude, BLOCKS)
        chosen_B, value, fp32_error_B, is_m4_B = choose_scales(
            magnitude, amax_B, amax, tensor_scale, METHOD, ORDINARY, BLOCKS
        )
        scale_B = chosen_B * tensor_scale
        tl.store(codes_ptr + block_B, pack_codes(value, lanes, BLOCKS), mask=is_block_B)
        tl.store(scales_ptr + block_B, e4m3_code(chosen_B).to(tl.uint8), mask=is_block_B)
        if ORDINARY:
            error_B += fp32_error_B.to(tl.float64)
        else:
            error_B += _wide_error(value, scale_B, magnitude, BLOCKS)
        weight_B += _squares(magnitude, ORDINARY, BLOCKS)
        if COMPARE:
            of_max_B += _error_of_max(magnitude, amax_B, amax, scale_of_max, ORDINARY, BLOCKS)
        zero_B += ((amax_B == 0) & is_block_B).to(tl.int32)
        flushed_B += ((chosen_B < _HOPPER_FLUSH_BELOW) & (amax_B > 0)).to(tl.int32)
        if METHOD == FOUR_OVER_SIX:
            m4_B += is_m4_B.to(tl.int32)
        block_B, is_block_B = next_block_B, is_next_B
    tl.store(sums_ptr, tl.sum(error_B, axis=0))
    tl.store(sums_ptr + programs, tl.sum(weight_B, axis=0))
    tl.store(sums_ptr + programs * 2, tl.sum(of_max_B, axis=0))
    tl.store(sums_ptr + programs * 3, tl.sum(zero_B, axis=0).to(tl.float64))
    tl.store(sums_ptr + programs * 4, tl.sum(m4_B, axis=0).to(tl.float64))
    tl.store(sums_ptr + programs * 5, tl.sum(flushed_B, axis=0).to(tl.float64))


@triton.jit
def _error_of_max(
    magnitude, amax_B, amax, tensor_scale, ORDINARY: tl.constexpr, BLOCKS: tl.constexpr
):
    """Squared errors that method `max` would have, fp64 [B]."""
    scale_B = scale_on_six(amax_B, 1.0, amax, E4M3_MAX, ORDINARY) * tensor_scale
    value = divide_and_round(magnitude, scale_B, ORDINARY, False)
    if ORDINARY:
        error = value * per_lane(scale_B) - magnitude
        return sum_squares(error, BLOCKS).to(tl.float64)
    else:
        value = tl.where(per_lane(scale_B > 0), value, 0.0)
        return _wide_error(value, scale_B, magnitude, BLOCKS)


@triton.jit
def _squares(magnitude, ORDINARY: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums of squares, fp64 [B]; in fp64 throughout where fp32 could over- or underflow."""
    if ORDINARY:
        return sum_squares(magnitude, BLOCKS).to(tl.float64)
    else:
        return sum_squares(magnitude.to(tl.float64), BLOCKS)


@triton.jit
def _wide_error(value, scale_B, magnitude, BLOCKS: tl.constexpr):
    """Squared errors of the dequantized fp32 weights, in fp64 throughout, [B]."""
    stored = (value * per_lane(scale_B)).to(tl.float64)
    return sum_squares(stored - magnitude.to(tl.float64), BLOCKS)
