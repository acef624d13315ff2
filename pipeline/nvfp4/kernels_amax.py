# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The amax of every matrix of a stack, in one launch.

In: weights [..., N, K] of any dtype that fp32 holds. Out: fp32 [...]. The bits of magnitudes are
ordered like the magnitudes, with Inf above all numbers and NaN above Inf, so an integer maximum
finds them in any order and lets neither NaN nor Inf pass unseen: `check_tensor_amax` refuses both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.nvfp4.kernels_blocks import as_matrices

_ELEMENTS = 4096  # per tile
_TILES = 16
_WARPS = 8


def tensor_amax(weight: Tensor) -> Tensor:
    """Return the amax of each matrix of [..., N, K], fp32 [...]; NaN where a weight is NaN."""
    matrices = as_matrices(weight)
    bits = matrices.new_zeros(len(matrices), dtype=torch.int32)
    programs = triton.cdiv(matrices.shape[1], _ELEMENTS * _TILES)
    if matrices.numel():
        _amax_kernel[(len(matrices) * programs,)](
            matrices,
            bits,
            matrices.stride(0),
            matrices.shape[1],
            programs,
            ELEMENTS=_ELEMENTS,
            TILES=_TILES,
            num_warps=_WARPS,
        )
    return bits.view(torch.float32).view(weight.shape[:-2])


@triton.jit(do_not_specialize=["programs"])
def _amax_kernel(
    weight_ptr,
    bits_ptr,
    matrix_stride,
    elements,
    programs,
    ELEMENTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid: `programs` per matrix, of TILES tiles each; raises bits_ptr[matrix]."""
    matrix = tl.program_id(0) // programs
    first = (tl.program_id(0) % programs).to(tl.int64) * (ELEMENTS * TILES)
    weight_ptr += matrix.to(tl.int64) * matrix_stride
    largest_X = tl.zeros((ELEMENTS,), tl.int32)
    for tile in tl.static_range(TILES):
        element_X = first + tile * ELEMENTS + tl.arange(0, ELEMENTS)
        value_X = tl.load(weight_ptr + element_X, mask=element_X < elements, other=0.0)
        bits_X = value_X.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest_X = tl.maximum(largest_X, bits_X)
    tl.atomic_max(bits_ptr + matrix, tl.max(largest_X, axis=0), sem="relaxed")
