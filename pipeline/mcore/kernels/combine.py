# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Rows to the experts, and back: each token's copies laid out by expert, and their weighted sum.

In: tokens, and where the row of each (token, choice) stands. Out: rows sorted by expert; or, per
token, the sum of its rows times their probabilities, in ascending order of experts, in fp32. The
order is fixed, so that the last bits are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MOST_COLUMNS = 2048
_WARPS = 4


def spread(tokens: torch.Tensor, position_TK: torch.Tensor, rows: int) -> torch.Tensor:
    """Copies of each token to its rows: [rows, width].

    Args:
        tokens: Contiguous [tokens, width].
        position_TK: Row of each (token, choice), int32, or -1 for none; all rows occur once.
        rows: Number of rows.
    """
    if tokens.is_cuda:
        return _spread_on_gpu(tokens, position_TK, rows)
    spread_out = tokens.new_empty(rows, tokens.shape[1])
    token_R, choice_R = (position_TK >= 0).nonzero(as_tuple=True)
    spread_out[position_TK[token_R, choice_R].long()] = tokens[token_R]
    return spread_out


def _spread_on_gpu(tokens: torch.Tensor, position_TK: torch.Tensor, rows: int) -> torch.Tensor:
    assert tokens.is_contiguous()
    assert position_TK.is_contiguous()
    spread_out = tokens.new_empty(rows, tokens.shape[1])
    grid, block = _columns(tokens)
    _spread_kernel[grid](
        tokens,
        position_TK,
        spread_out,
        tokens.shape[1],
        TOP_K=position_TK.shape[1],
        BLOCK=block,
        num_warps=_WARPS,
    )
    return spread_out


def combine(
    rows: torch.Tensor, position_TK: torch.Tensor, probs_TK: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """For each token, the sum over its rows of probability * row: `dtype` [tokens, width].

    Args:
        rows: Contiguous [rows, width].
        position_TK: Row of each (token, choice), int32, or -1 for none; choices in the order in
            which they are to be added.
        probs_TK: fp32.
        dtype: What the fp32 sum is rounded to.
    """
    if rows.is_cuda:
        return _combine_on_gpu(rows, position_TK, probs_TK, dtype)
    total = rows.new_zeros(position_TK.shape[0], rows.shape[1], dtype=torch.float32)
    for position_T, prob_T in zip(position_TK.unbind(1), probs_TK.unbind(1), strict=True):
        has_row_T = position_T >= 0
        chosen = rows[position_T[has_row_T].long()].float()
        total[has_row_T] += prob_T[has_row_T].unsqueeze(1) * chosen
    return total.to(dtype)


def _combine_on_gpu(
    rows: torch.Tensor, position_TK: torch.Tensor, probs_TK: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    assert rows.is_contiguous()
    assert position_TK.is_contiguous()
    assert probs_TK.is_contiguous()
    combined = rows.new_empty(position_TK.shape[0], rows.shape[1], dtype=dtype)
    grid, block = _columns(combined)
    _combine_kernel[grid](
        rows,
        position_TK,
        probs_TK,
        combined,
        rows.shape[1],
        TOP_K=position_TK.shape[1],
        BLOCK=block,
        num_warps=_WARPS,
    )
    return combined


def _columns(tokens: torch.Tensor) -> tuple[tuple[int, int], int]:
    """The grid over [tokens, width] and the columns of one block."""
    block = min(triton.next_power_of_2(tokens.shape[1]), _MOST_COLUMNS)
    return (tokens.shape[0], triton.cdiv(tokens.shape[1], block)), block


@triton.jit
def _spread_kernel(
    tokens_ptr, position_ptr, rows_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(tokens_ptr + token * width + column, mask=inside)
    for choice in range(TOP_K):
        row = tl.load(position_ptr + token * TOP_K + choice).to(tl.int64)
        tl.store(rows_ptr + row * width + column, values, mask=inside & (row >= 0))


@triton.jit
def _combine_kernel(
    rows_ptr,
    position_ptr,
    probs_ptr,
    combined_ptr,
    width,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(TOP_K):
        row = tl.load(position_ptr + token * TOP_K + choice).to(tl.int64)
        prob = tl.load(probs_ptr + token * TOP_K + choice)
        has_row = row >= 0
        values = tl.load(rows_ptr + row * width + column, mask=inside & has_row, other=0.0)
        total += tl.where(has_row, prob * values.to(tl.float32), 0.0)
    tl.store(combined_ptr + token * width + column, total, mask=inside)
