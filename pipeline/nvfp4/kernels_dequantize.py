# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""From packed NVFP4 weights back to the values they stand for, on a GPU.

In: codes, block scales and tensor scales. Out: weights [..., N, K] of any dtype, with the bits of
`reference.dequantize_nvfp4`; then, on request, zeros where Hopper's kernels flush a block's scale.
Each block needs its own scales only; matrices are flat lists of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4 import formats
from pipeline.nvfp4.kernels_blocks import LAUNCH, e4m3_value
from pipeline.nvfp4.reference import PackedWeight

_BLOCKS = 256  # per program
_WARPS = 4
_FLUSH_BELOW = tl.constexpr(formats.HOPPER_FLUSH_BELOW)


def dequantize_nvfp4(
    packed: PackedWeight, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """The weights [..., N, K] of a packed weight, as `reference.dequantize_nvfp4` has them.

    Args:
        packed: Codes and scales.
        dtype: Of the weights.
        out: Contiguous weights [..., N, K] of that dtype to write into.
    """
    codes, scales = packed.codes.contiguous(), packed.weight_scale.contiguous()
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    weight = codes.new_empty(shape, dtype=dtype) if out is None else out
    assert (weight.shape, weight.dtype) == (shape, dtype)
    assert weight.is_contiguous()
    n_matrices = packed.weight_scale_2.numel()
    if weight.numel():
        blocks_per_matrix = scales.numel() // n_matrices
        programs = triton.cdiv(blocks_per_matrix, _BLOCKS)
        _dequantize_kernel[(n_matrices * programs,)](
            codes,
            scales.view(torch.uint8),
            packed.weight_scale_2.contiguous(),
            weight,
            blocks_per_matrix,
            programs,
            BLOCKS=_BLOCKS,
            num_warps=_WARPS,
            **LAUNCH,
        )
    return weight


def zero_flushed(weight: Tensor, weight_scale: Tensor) -> None:
    """Zero the blocks whose scales Hopper's kernels flush; weights are written, never read.

    Args:
        weight: Contiguous [..., N, K].
        weight_scale: float8_e4m3fn [..., N, K/16].
    """
    scales = weight_scale.contiguous()
    assert weight.is_contiguous()
    assert weight.numel() == formats.BLOCK_SIZE * scales.numel()
    if scales.numel():
        _zero_kernel[(triton.cdiv(scales.numel(), _BLOCKS),)](
            scales.view(torch.uint8), weight, scales.numel(), BLOCKS=_BLOCKS, num_warps=_WARPS
        )


@triton.jit(do_not_specialize=["blocks_per_matrix", "programs"])
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    tensor_scale_ptr,
    weight_ptr,
    blocks_per_matrix,
    programs,
    BLOCKS: tl.constexpr,
):
    """Grid: `programs` per matrix, of BLOCKS blocks each."""
    matrix = tl.program_id(0) // programs
    first = (tl.program_id(0) % programs) * BLOCKS
    is_block_B = first + tl.arange(0, BLOCKS) < blocks_per_matrix
    block_B = matrix.to(tl.int64) * blocks_per_matrix + first + tl.arange(0, BLOCKS)
    code_BH = tl.load(
        codes_ptr + block_B[:, None] * 8 + tl.arange(0, 8)[None, :], mask=is_block_B[:, None]
    ).to(tl.int32)
    code_BL = tl.reshape(tl.join(code_BH & 15, code_BH >> 4), (BLOCKS, 16))
    scale_B = e4m3_value(tl.load(scales_ptr + block_B, mask=is_block_B).to(tl.int32))
    scale_B *= tl.load(tensor_scale_ptr + matrix)
    # The codes of E2M1 are the top bits of fp32 values 2**126 times smaller. Code 8 is +0.0.
    magnitude = ((code_BL & 7) << 22).to(tl.float32, bitcast=True) * 2.0**126
    value = tl.where(code_BL > 8, -magnitude, magnitude) * scale_B[:, None]
    tl.store(
        weight_ptr + block_B[:, None] * 16 + tl.arange(0, 16)[None, :],
        value.to(weight_ptr.dtype.element_ty),
        mask=is_block_B[:, None],
    )


@triton.jit(do_not_specialize=["blocks"])
def _zero_kernel(scales_ptr, weight_ptr, blocks: tl.int64, BLOCKS: tl.constexpr):
    """Grid: BLOCKS blocks each."""
    block_B = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    # What is no block has a scale that stays.
    code_B = tl.load(scales_ptr + block_B, mask=block_B < blocks, other=0x7E).to(tl.int32)
    is_flushed_BL = tl.broadcast_to((e4m3_value(code_B) < _FLUSH_BELOW)[:, None], (BLOCKS, 16))
    zero_BL = tl.zeros((BLOCKS, 16), weight_ptr.dtype.element_ty)
    element_BL = block_B[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(weight_ptr + element_BL, zero_BL, mask=is_flushed_BL)
