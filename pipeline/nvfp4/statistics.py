"""What packing cost: squared errors and block counts of NVFP4 weights, per matrix.

In: the weights [..., N, K], what they were packed to, and the amax they were packed with. Out:
fp64 sums and int64 counts [...], which add up over shards (SUM) because a block never crosses one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.nvfp4.formats import (
    BLOCK_SIZE,
    FOUR_OVER_SIX_MULTIPLIER,
    HOPPER_FLUSH_BELOW,
    WeightMethod,
)
from pipeline.nvfp4.reference import (
    PackedWeight,
    dequantize_nvfp4,
    quantize_nvfp4,
    scale_from_amax,
)
from pipeline.nvfp4.rows import as_rows, row_chunks, to_lanes

SEARCHING_METHODS = (WeightMethod.four_over_six, WeightMethod.mse)
"""Methods that try several scales, and whose error is worth comparing with that of `max`."""


@dataclass(frozen=True, eq=False)
class WeightStatistics:
    """Sums and counts of each matrix [...]; SUM over shards gives those of the whole tensor.

    Attributes:
        squared_error: fp64, sum of (dequantized - weight)**2.
        squared_weight: fp64, sum of weight**2.
        blocks: int64, all blocks.
        zero_blocks: int64, blocks of zeros only.
        blocks_m4: int64, blocks that four-over-six landed on 4 (zero under the other methods).
        blocks_flushed: int64, blocks other than zero whose scale is below 2**-6: kernels on Hopper
            flush it to zero.
        squared_error_of_max: fp64, what method `max` would have for `squared_error`; equal to it
            where nobody asked for the comparison.
    """

    squared_error: Tensor
    squared_weight: Tensor
    blocks: Tensor
    zero_blocks: Tensor
    blocks_m4: Tensor
    blocks_flushed: Tensor
    squared_error_of_max: Tensor


def measure_statistics(
    weight: Tensor,
    packed: PackedWeight,
    tensor_amax: Tensor,
    method: WeightMethod,
    compare_to_max: bool = False,
) -> WeightStatistics:
    """Compare weights [..., N, K] with what they were packed to by `method` and `tensor_amax`.

    `compare_to_max` packs by `max` as well, to measure its error, under methods that search.
    """
    rows_RK, amax_R, tensor_scale_R = as_rows(weight, tensor_amax, packed.weight_scale_2)
    codes_RC, scales_RB = packed.codes.flatten(0, -2), packed.weight_scale.flatten(0, -2)
    n_rows = len(rows_RK)
    error_R = rows_RK.new_empty(n_rows, dtype=torch.float64)
    weight_R = torch.empty_like(error_R)
    zero_R, m4_R, flushed_R = (torch.empty_like(error_R, dtype=torch.int64) for _ in range(3))
    for chunk in row_chunks(rows_RK):
        # One matrix per row: the record of a chunk, whichever matrices it crosses.
        part = PackedWeight(codes_RC[chunk, None], scales_RB[chunk, None], tensor_scale_R[chunk])
        error_R[chunk] = _squared_error(rows_RK[chunk], dequantize_nvfp4(part).squeeze(1))
        weight_R[chunk] = rows_RK[chunk].double().square().sum(-1)
        scale_B = scales_RB[chunk].flatten()
        amax_B = to_lanes(rows_RK[chunk]).abs().amax(0)
        tensor_amax_B = amax_R[chunk].repeat_interleave(scales_RB.shape[1])
        is_flushed_B = (scale_B.float() < HOPPER_FLUSH_BELOW) & (amax_B > 0)
        is_m4_B = _landed_on_four(scale_B, amax_B, tensor_amax_B, method)
        for counts_R, is_counted_B in (
            (zero_R, amax_B == 0),
            (m4_R, is_m4_B),
            (flushed_R, is_flushed_B),
        ):
            counts_R[chunk] = is_counted_B.view(-1, scales_RB.shape[1]).sum(-1)
    blocks_R = torch.full_like(zero_R, weight.shape[-1] // BLOCK_SIZE)
    columns_R = (error_R, weight_R, blocks_R, zero_R, m4_R, flushed_R)
    sums = [values.view(weight.shape[:-1]).sum(-1) for values in columns_R]
    is_compared = compare_to_max and method in SEARCHING_METHODS
    sums.append(squared_error_of_max(weight, tensor_amax) if is_compared else sums[0])
    return WeightStatistics(*sums)


def squared_error_of_max(weight: Tensor, tensor_amax: Tensor) -> Tensor:
    """Return the squared error that method `max` would have, fp64 [...]: what others compare to."""
    rows_RK, amax_R = as_rows(weight, tensor_amax)
    error_R = rows_RK.new_empty(len(rows_RK), dtype=torch.float64)
    for chunk in row_chunks(rows_RK):
        packed = quantize_nvfp4(rows_RK[chunk, None], amax_R[chunk], WeightMethod.max)
        error_R[chunk] = _squared_error(rows_RK[chunk], dequantize_nvfp4(packed).squeeze(1))
    return error_R.view(weight.shape[:-1]).sum(-1)


def squared_weight(weight: Tensor) -> Tensor:
    """Return the sum of squares of each matrix, fp64 [...]: what relative errors divide by."""
    (rows_RK,) = as_rows(weight)
    squares_R = rows_RK.new_empty(len(rows_RK), dtype=torch.float64)
    for chunk in row_chunks(rows_RK):
        squares_R[chunk] = rows_RK[chunk].double().square().sum(-1)
    return squares_R.view(weight.shape[:-1]).sum(-1)


def _landed_on_four(
    scale_B: Tensor, amax_B: Tensor, tensor_amax_B: Tensor, method: WeightMethod
) -> Tensor:
    """Return bool [B]: four-over-six took the scale of multiplier 1.5 and it is another one."""
    if method is not WeightMethod.four_over_six:
        return torch.zeros_like(amax_B, dtype=torch.bool)
    on_six_B = scale_from_amax(amax_B, tensor_amax_B, method)
    on_four_B = scale_from_amax(amax_B, tensor_amax_B, method, FOUR_OVER_SIX_MULTIPLIER)
    # Bytes, because not every device compares float8.
    byte_B, six_B, four_B = (t.view(torch.uint8) for t in (scale_B, on_six_B, on_four_B))
    return (byte_B == four_B) & (four_B != six_B)


def _squared_error(rows_RK: Tensor, dequantized_RK: Tensor) -> Tensor:
    return (dequantized_RK.double() - rows_RK.double()).square().sum(-1)
