"""Reproducible random weights: a value follows from a key and its place in the tensor, alone.

In: a key for each tensor (from a seed and the tensor's name), and which part of a matrix to fill.
Out: the same bits under every cut, on the CPU (torch, below) and on a GPU (the Triton kernel at the
end). All randomness is integer arithmetic: a 32-bit hash of the element's offset, whose bytes are
added up (the sum of eight uniform numbers is nearly normal). The sum is exact in fp32, all factors
but one are powers of two, so a value is rounded once, by one multiplication (nothing that a fused
multiply-add could change), and once more to BF16.

Trained weights have outliers, and quantizers are made for them. One element in 4,096 is eight times
larger, and one input column in 64 is four times larger.

Legend: E tensors, R rows, C columns of the part that is filled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

MASK = 0xFFFFFFFF
MIDDLE = 8 * 255 // 2
SPREAD = math.sqrt(8 * (256**2 - 1) / 12)
"""Mean and standard deviation of the sum of eight bytes."""
TAIL_ONE_IN, TAIL_FACTOR = 4096, 8
LARGE_COLUMN_ONE_IN, LARGE_COLUMN_FACTOR = 64, 4
_GROWTH = math.sqrt(
    (1 + (TAIL_FACTOR**2 - 1) / TAIL_ONE_IN)
    * (1 + (LARGE_COLUMN_FACTOR**2 - 1) / LARGE_COLUMN_ONE_IN)
)
"""By how much the outliers raise the standard deviation."""

# Elements that the torch version works on at a time: its int64 temporaries stay in the cache.
_CPU_ELEMENTS = 1 << 16
# Fixed tiles. Rows of a tile share the hashes of its columns; four warps write 1 KiB of BF16 rows.
_TILE_ROWS, _TILE_COLUMNS, _WARPS = 8, 512, 4

Key = tuple[int, int]
"""Two 32-bit numbers."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Where the part to fill begins, in matrices of `columns` columns."""

    columns: int
    first_row: int = 0
    first_column: int = 0


def key_of(seed: int, name: str) -> Key:
    """The key of a tensor."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def random_bits(offset: torch.Tensor, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit hashes (int64 tensors) of every 64-bit offset.

    The first round is Wellons' lowbias32; the key's second half enters after it, so that no two
    tensors run through the same numbers in another order.
    """
    x = (offset & MASK) ^ key[0]
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    x = (x ^ (x >> 16)) + key[1] + (offset >> 32) * 0x9E3779B1
    x = (x * 0x2C1B3C6D) & MASK
    first = x ^ (x >> 15)
    x = (first * 0x297A2D39) & MASK
    return first, x ^ (x >> 14)


def sum_of_bytes(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The eight bytes of two 32-bit numbers, added up and centred: -1020 to 1020."""
    pairs = 0x00FF00FF
    total = (first & pairs) + ((first >> 8) & pairs) + (second & pairs) + ((second >> 8) & pairs)
    return (total & 0xFFFF) + (total >> 16) - MIDDLE


def fill_normal(
    target_ERC: torch.Tensor,
    keys: Sequence[Key],
    window: Window,
    *,
    standard_deviation: float,
    is_bf16: bool,
) -> None:
    """Fills parts of E matrices of one shape with nearly normal values that have outliers.

    Args:
        target_ERC: BF16 or FP32, on any device; only the last dim must be dense.
        keys: One for each of the E matrices.
        window: Which part of them.
        standard_deviation: Of the values, outliers included.
        is_bf16: Whether the values are BF16 (an FP32 target then holds BF16 values).
    """
    assert target_ERC.dtype in (torch.bfloat16, torch.float32)
    assert len(keys) == target_ERC.shape[0]
    assert target_ERC.stride(2) == 1 or target_ERC.shape[2] == 1
    scale = torch.tensor(standard_deviation / (SPREAD * _GROWTH), dtype=torch.float32).item()
    if not target_ERC.numel():
        return
    if target_ERC.is_cuda:
        with torch.cuda.device(target_ERC.device):
            launch_fill_normal(target_ERC, keys, window, scale=scale, is_bf16=is_bf16)
        return
    rows, columns = target_ERC.shape[1:]
    step = max(1, _CPU_ELEMENTS // columns)
    for target_RC, key in zip(target_ERC, keys, strict=True):
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = dataclasses.replace(window, first_row=window.first_row + first)
            values_RC = _normal_values(last - first, columns, key, part, scale)
            target_RC[first:last] = values_RC.bfloat16() if is_bf16 else values_RC


def _normal_values(rows: int, columns: int, key: Key, window: Window, scale: float) -> torch.Tensor:
    """The kernel's meaning: fp32 [rows, columns]."""
    row_R = window.first_row + torch.arange(rows)
    column_C = window.first_column + torch.arange(columns)
    offset_RC = row_R[:, None] * window.columns + column_C
    first_RC, second_RC = random_bits(offset_RC, key)
    is_tail_RC = (first_RC * 0x85EBCA6B + second_RC) & MASK < (1 << 32) // TAIL_ONE_IN
    sum_RC = sum_of_bytes(first_RC, second_RC)
    sum_RC = torch.where(is_tail_RC, TAIL_FACTOR * sum_RC, sum_RC)
    hash_C, _ = random_bits(column_C, (key[1], key[0]))
    is_large_C = hash_C < (1 << 32) // LARGE_COLUMN_ONE_IN
    scale_C = torch.where(is_large_C, LARGE_COLUMN_FACTOR * scale, scale).float()
    return sum_RC.float() * scale_C


def launch_fill_normal(
    target_ERC: torch.Tensor,
    keys: Sequence[Key],
    window: Window,
    *,
    scale: float,
    is_bf16: bool,
) -> None:
    """Runs the kernel on the current stream; arguments as for `fill_normal`."""
    matrices, rows, columns = target_ERC.shape
    is_wide = target_ERC.dtype is torch.float32
    keys_E2 = torch.tensor(keys).to(target_ERC.device, non_blocking=True)
    row_tiles, column_tiles = triton.cdiv(rows, _TILE_ROWS), triton.cdiv(columns, _TILE_COLUMNS)
    _fill_normal_kernel[(matrices * row_tiles * column_tiles,)](
        target_ERC if is_wide else target_ERC.view(torch.int16),
        keys_E2,
        target_ERC.stride(0),
        target_ERC.stride(1),
        rows,
        columns,
        window.columns,
        window.first_row,
        window.first_column,
        scale,
        ROUND=is_bf16 or not is_wide,
        WIDE=is_wide,
        ROWS=_TILE_ROWS,
        COLUMNS=_TILE_COLUMNS,
        num_warps=_WARPS,
    )


@triton.jit
def _random_bits(offset, key_0, key_1):  # type: ignore[no-untyped-def]
    """`random_bits` on uint32."""
    x = offset.to(tl.uint32) ^ key_0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = (x ^ (x >> 16)) + key_1 + (offset >> 32).to(tl.uint32) * 0x9E3779B1
    x = x * 0x2C1B3C6D
    first = x ^ (x >> 15)
    x = first * 0x297A2D39
    return first, x ^ (x >> 14)


@triton.jit(do_not_specialize=["first_row", "first_column"])  # type: ignore[untyped-decorator]
def _fill_normal_kernel(  # type: ignore[no-untyped-def]
    target_ptr,
    keys_ptr,
    matrix_stride,
    row_stride,
    rows,
    columns,
    whole_columns,
    first_row,
    first_column,
    scale,
    ROUND: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one matrix."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    matrix = tile // (row_tiles * column_tiles)
    tile = tile % (row_tiles * column_tiles)
    row_R = ((tile // column_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column_C = ((tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    key_0 = tl.load(keys_ptr + 2 * matrix).to(tl.uint32)
    key_1 = tl.load(keys_ptr + 2 * matrix + 1).to(tl.uint32)

    whole_column_C = column_C + first_column
    offset_RC = ((row_R + first_row) * whole_columns)[:, None] + whole_column_C[None, :]
    first, second = _random_bits(offset_RC, key_0, key_1)
    total = (first & 0x00FF00FF) + ((first >> 8) & 0x00FF00FF)
    total += (second & 0x00FF00FF) + ((second >> 8) & 0x00FF00FF)
    total = (total & 0xFFFF) + (total >> 16)
    is_tail = first * 0x85EBCA6B + second < 1048576  # 2**32 / TAIL_ONE_IN
    value = total.to(tl.int32).to(tl.float32) - 1020.0  # MIDDLE
    value = tl.where(is_tail, 8.0 * value, value)  # TAIL_FACTOR
    hash_C, _ = _random_bits(whole_column_C, key_1, key_0)
    # 2**32 / LARGE_COLUMN_ONE_IN, LARGE_COLUMN_FACTOR
    value = value * tl.where(hash_C < 67108864, 4.0 * scale, scale)[None, :]

    target = target_ptr + matrix.to(tl.int64) * matrix_stride
    target += row_R[:, None] * row_stride + column_C[None, :]
    inside = (row_R[:, None] < rows) & (column_C[None, :] < columns)
    if ROUND:
        # To nearest, ties to even, in integers: Triton's interpreter converts otherwise.
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        if WIDE:
            tl.store(target, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), mask=inside)
        else:
            tl.store(target, (bits >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(target, value, mask=inside)
