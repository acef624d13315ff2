# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Products of groups of rows, each with the weight of its own expert.

In: rows sorted by expert, the experts' weights in one stack, where each expert's rows begin. Out:
the products; on request their squared ReLU and its amax, without another pass over memory.

One kernel computes all experts: a fixed number of programs take turns at the tiles of the output,
whose list is made on the device, because only the device knows how many rows each expert has. It
loads by Hopper's tensor memory accelerator, which asks for widths that are multiples of 16 bytes.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pipeline.mcore.kernels.activation import relu_squared_

# The fastest on an H100 of those tried at the width of Nemotron 3 Ultra.
_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 256, 64
_WARPS, _STAGES = 8, 3
# Programs that run at the same time share rows of this many tiles, and weights, in the L2 cache.
_TILES_IN_TURN = 16
_TILE_FIELDS = tl.constexpr(5)
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """How rows sorted by expert divide among the experts.

    Attributes:
        offsets: Where each expert's rows begin, and where the last one's end, int64 [experts + 1].
        rows: How many rows there are: `offsets[-1]`, known to the host.
        tiles: What the kernel needs to know of each tile of `_BLOCK_M` rows, int32 [n, 5] (expert,
            tiles before this expert, tiles of this expert, its first row, its last row + 1); empty
            where the rows are on a CPU.
        tile_count: How many entries of `tiles` are used, int32 [1].
    """

    offsets: torch.Tensor
    rows: int
    tiles: torch.Tensor
    tile_count: torch.Tensor


def group_rows(offsets: torch.Tensor, rows: int) -> RowGroups:
    """The groups that begin at `offsets`, int64 [experts + 1]; does not synchronise the host."""
    if not offsets.is_cuda:
        nothing = offsets.new_empty(0, dtype=torch.int32)
        return RowGroups(offsets, rows, nothing, nothing)
    return RowGroups(offsets, rows, *_list_tiles(offsets, rows))


def _list_tiles(offsets: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`tiles` and `tile_count` of `RowGroups`."""
    begins, ends = offsets[:-1], offsets[1:]
    tiles_E = (ends - begins + _BLOCK_M - 1) // _BLOCK_M
    last_E = tiles_E.cumsum(0)
    at_most = rows // _BLOCK_M + begins.shape[0]
    tile = torch.arange(at_most, device=offsets.device)
    expert = torch.searchsorted(last_E, tile, right=True).clamp_(max=begins.shape[0] - 1)
    table = torch.stack((last_E - tiles_E, tiles_E, begins, ends), dim=1)[expert]
    tiles = torch.cat((expert.unsqueeze(1), table), dim=1)
    return tiles.to(torch.int32), last_E[-1:].to(torch.int32)


def grouped_mm(
    rows: torch.Tensor,
    weight_ENK: torch.Tensor,
    groups: RowGroups,
    *,
    squares_relu: bool = False,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row [K] times its own expert's weight: [rows, N] in the dtype of the rows.

    Args:
        rows: Contiguous [rows, K], sorted by expert. An expert may have none.
        weight_ENK: Contiguous stack of the experts' weights, of the same dtype.
        groups: How the rows divide among the experts.
        squares_relu: Whether to give `relu(product)**2`, computed from the rounded product.
        amax: Running amax, fp32 [1], to be raised by the largest output (by inf where one is NaN);
            only together with `squares_relu`.

    Everything but 16-bit floats on CUDA, with K a multiple of 8, goes through a loop over the
    experts, which reads the offsets on the host.
    """
    assert amax is None or squares_relu
    assert rows.shape[0] == groups.rows
    is_aligned = weight_ENK.shape[2] % 8 == 0
    if not (rows.is_cuda and rows.dtype in _KERNEL_DTYPES and is_aligned):
        output = _loop_over_experts(rows, weight_ENK, groups.offsets)
        return relu_squared_(output, amax) if squares_relu else output
    programs = torch.cuda.get_device_properties(rows.device).multi_processor_count
    return _multiply_on_gpu(rows, weight_ENK, groups, squares_relu, amax, programs)


def _loop_over_experts(
    rows: torch.Tensor, weight_ENK: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    output = rows.new_empty(rows.shape[0], weight_ENK.shape[1])
    bounds = offsets.tolist()
    for weight_NK, begin, end in zip(weight_ENK, bounds[:-1], bounds[1:], strict=True):
        output[begin:end] = F.linear(rows[begin:end], weight_NK)
    return output


def _multiply_on_gpu(
    rows: torch.Tensor,
    weight_ENK: torch.Tensor,
    groups: RowGroups,
    squares_relu: bool,
    amax: torch.Tensor | None,
    programs: int,
) -> torch.Tensor:
    experts, width, depth = weight_ENK.shape
    assert rows.is_contiguous()
    assert weight_ENK.is_contiguous()
    assert amax is None or (amax.dtype is torch.float32 and amax.numel() == 1)
    output = rows.new_empty(groups.rows, width)
    if groups.rows == 0:
        return output
    _grouped_mm_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [_BLOCK_M, _BLOCK_K]),
        TensorDescriptor.from_tensor(weight_ENK.view(experts * width, depth), [_BLOCK_N, _BLOCK_K]),
        output,
        groups.tile_count if amax is None else amax.view(torch.int32),
        groups.tiles,
        groups.tile_count,
        width,
        DEPTH=depth,
        IN_TURN=_TILES_IN_TURN,
        SQUARES_RELU=squares_relu,
        HAS_AMAX=amax is not None,
        HAS_WHOLE_TILES=width % _BLOCK_N == 0,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return output


@triton.jit
def _place_of(
    tile,
    tiles_ptr,
    column_tiles,
    IN_TURN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Expert, first row, end of the expert's rows, first column of an output tile.

    The tiles of one expert follow each other, rows first, at most IN_TURN of them; an expert with m
    tiles of rows has m * column_tiles, so that entry `tile // column_tiles` is one of its own.
    """
    entry = tiles_ptr + (tile // column_tiles) * _TILE_FIELDS
    expert = tl.load(entry)
    tiles_before = tl.load(entry + 1)
    row_tiles = tl.load(entry + 2)
    begin = tl.load(entry + 3)
    end = tl.load(entry + 4)
    within = tile - tiles_before * column_tiles
    turn = within // (IN_TURN * column_tiles)
    within -= turn * IN_TURN * column_tiles
    in_this_turn = min(row_tiles - turn * IN_TURN, IN_TURN)
    row = begin + (turn * IN_TURN + within % in_this_turn) * BLOCK_M
    return expert, row, end, (within // in_this_turn) * BLOCK_N


@triton.jit
def _grouped_mm_kernel(
    rows_desc,
    weight_desc,
    output_ptr,
    amax_bits_ptr,
    tiles_ptr,
    tile_count_ptr,
    width,
    DEPTH: tl.constexpr,
    IN_TURN: tl.constexpr,
    SQUARES_RELU: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    HAS_WHOLE_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(width, BLOCK_N)
    tile_count = tl.load(tile_count_ptr) * column_tiles
    programs = tl.num_programs(0)
    stored = tl.program_id(0) - programs
    largest_M = tl.zeros((BLOCK_M,), tl.int32)
    # Flattened, the loads of the next tile are under way while this one is stored.
    for tile in tl.range(tl.program_id(0), tile_count, programs, flatten=True):
        expert, row, end, column = _place_of(
            tile, tiles_ptr, column_tiles, IN_TURN, BLOCK_M, BLOCK_N
        )
        # Rows and columns beyond this expert's are another one's: computed, and not stored.
        product_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(DEPTH, BLOCK_K)):
            rows_MK = rows_desc.load([row, step * BLOCK_K])
            weight_NK = weight_desc.load([expert * width + column, step * BLOCK_K])
            product_MN = tl.dot(rows_MK, weight_NK.T, product_MN)
        # The same place again: carrying it through the flattened loop would take registers.
        stored += programs
        _, row, end, column = _place_of(stored, tiles_ptr, column_tiles, IN_TURN, BLOCK_M, BLOCK_N)
        at_row = row + tl.arange(0, BLOCK_M)
        at_column = column + tl.arange(0, BLOCK_N)
        if SQUARES_RELU:
            # Before it is rounded, which changes nothing and is one instruction with the rounding.
            product_MN = tl.maximum(product_MN, 0.0, propagate_nan=tl.PropagateNan.ALL)
        output_MN = product_MN.to(output_ptr.dtype.element_ty)
        if SQUARES_RELU:
            output_MN *= output_MN  # rounded once, to the same bits as the product in fp32
        if HAS_AMAX:
            # Without a sign, the bits of floats are ordered like the floats, NaN above inf.
            bits_MN = output_MN.to(tl.int16, bitcast=True)
            if not HAS_WHOLE_TILES:
                bits_MN = tl.where((at_column < width)[None, :], bits_MN, 0)
            bits_M = tl.where(at_row < end, tl.max(bits_MN, axis=1), 0)
            largest_M = tl.maximum(largest_M, bits_M.to(tl.int32))
        place_MN = at_row[:, None].to(tl.int64) * width + at_column[None, :]
        inside_MN = (at_row < end)[:, None] & (at_column < width)[None, :]
        tl.store(output_ptr + place_MN, output_MN, mask=inside_MN)
    if HAS_AMAX:
        largest = tl.max(largest_M, axis=0).to(tl.int16)
        amax = largest.to(output_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
        amax = tl.where(amax == amax, amax, float("inf"))
        tl.atomic_max(amax_bits_ptr, amax.to(tl.int32, bitcast=True))
