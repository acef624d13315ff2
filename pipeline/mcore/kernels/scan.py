# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Mamba-2's state space scan (SSD) in three kernels; `pipeline.mcore.ssd` says what it computes.

In: convolved x, B and C in bf16 (slices of wider rows, read in place), time steps, decay rates.
Out: the scan's outputs. The sequence is cut into chunks:

1. `_time_step_kernel`: softplus of the time steps, and the log decay from the start of each chunk.
2. `_state_kernel`: goes through the chunks with the state in registers and leaves behind the state
   at the start of each. (Kernels that first compute each chunk's own contribution and then add
   them up move these states, which are twice as large as x in fp32, through memory three times.)
3. `_output_kernel`: what reaches each position from the state and from its own chunk. Heads of one
   group share B and C, hence the scores of their chunk: one program takes several.

States are carried in fp32 and rounded to bf16 for products, which add up in fp32. Nothing depends
on the number of sequences, and no order of additions on timing.

Dims: b batch, l sequence, c chunk, q position in a chunk, h head, p head dim, g group, n state.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_CHUNK = 128
_SMALLEST_DOT = 16
# What was fastest on an H100 at the width of Nemotron 3 Ultra (0.9 and 2.1 ms for 32,768 tokens).
_TIME_STEP_HEADS = 16
_STATE_WARPS, _STATE_STAGES = 4, 2
_OUTPUT_HEADS, _OUTPUT_ROWS, _OUTPUT_WARPS, _OUTPUT_STAGES = 16, 64, 4, 2


def scan(
    x_blhp: torch.Tensor,
    dt_blh: torch.Tensor,
    rate_h: torch.Tensor,
    B_blgn: torch.Tensor,
    C_blgn: torch.Tensor,
    D_h: torch.Tensor,
    dt_bias_h: torch.Tensor,
) -> torch.Tensor:
    """Outputs of the scan, from an empty state, on a GPU.

    Args:
        x_blhp: Inputs, bf16; [h, p] contiguous, other strides free.
        dt_blh: Time steps before bias and softplus; contiguous.
        rate_h: Negative decay rates, fp32.
        B_blgn: Input projections, bf16; [g, n] contiguous, other strides as those of x.
        C_blgn: Output projections, likewise.
        D_h: Skip weights, any float dtype.
        dt_bias_h: Bias of the time steps, any float dtype.

    Returns:
        Contiguous [b, l, h, p] in bf16.
    """
    batch, length, heads, head_dim = x_blhp.shape
    groups, state = B_blgn.shape[2:]
    strides = x_blhp.stride()[:2]
    assert x_blhp.stride() == (*strides, head_dim, 1)
    assert B_blgn.stride() == C_blgn.stride() == (*strides, state, 1)
    assert dt_blh.is_contiguous()
    chunks, together = triton.cdiv(length, _CHUNK), math.gcd(heads // groups, _OUTPUT_HEADS)
    dt_bhl = x_blhp.new_empty(batch, heads, chunks * _CHUNK, dtype=torch.float32)
    decay_bhl = torch.empty_like(dt_bhl)
    states_bhcnp = x_blhp.new_empty(batch, heads, chunks, state, head_dim)
    y_blhp = x_blhp.new_empty(x_blhp.shape)
    sizes = (length, heads, heads // groups, head_dim, state)
    blocks = {
        "CHUNK": _CHUNK,
        "BLOCK_P": max(triton.next_power_of_2(head_dim), _SMALLEST_DOT),
        "BLOCK_N": max(triton.next_power_of_2(state), _SMALLEST_DOT),
    }
    _time_step_kernel[(chunks, triton.cdiv(heads, _TIME_STEP_HEADS), batch)](
        *(dt_blh, rate_h, dt_bias_h, dt_bhl, decay_bhl, length, heads),
        CHUNK=_CHUNK,
        HEADS=_TIME_STEP_HEADS,
    )
    _state_kernel[(heads, batch)](
        *(x_blhp, B_blgn, dt_bhl, decay_bhl, states_bhcnp, *strides, *sizes),
        **blocks,
        num_warps=_STATE_WARPS,
        num_stages=_STATE_STAGES,
    )
    _output_kernel[(chunks * (_CHUNK // _OUTPUT_ROWS), heads // together, batch)](
        *(x_blhp, B_blgn, C_blgn, D_h, dt_bhl, decay_bhl, states_bhcnp, y_blhp, *strides, *sizes),
        **blocks,
        HEADS=together,
        ROWS=_OUTPUT_ROWS,
        num_warps=_OUTPUT_WARPS,
        num_stages=_OUTPUT_STAGES,
    )
    return y_blhp


@triton.jit
def _time_step_kernel(
    dt_ptr,
    rate_ptr,
    bias_ptr,
    dt_out_ptr,
    decay_ptr,
    length,
    heads,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    positions = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    sequence = tl.program_id(2).to(tl.int64)
    exists, inside = head < heads, positions < length
    rows = sequence * length + positions
    dt = _tile(dt_ptr, rows, heads, inside, head, 1, exists).to(tl.float32)
    bias = tl.load(bias_ptr + head, mask=exists, other=0.0).to(tl.float32)
    # Positions past the end neither decay the state nor feed it.
    dt = tl.where(inside[:, None], _softplus(dt + bias[None, :]), 0.0)
    rate = tl.load(rate_ptr + head, mask=exists, other=0.0).to(tl.float32)
    decay = tl.cumsum(dt * rate[None, :], axis=0)
    padded = tl.cdiv(length, CHUNK) * CHUNK
    out = (sequence * heads + head)[None, :] * padded + positions[:, None]
    tl.store(dt_out_ptr + out, dt, mask=exists[None, :])
    tl.store(decay_ptr + out, decay, mask=exists[None, :])


@triton.jit
def _state_kernel(
    x_ptr,
    B_ptr,
    dt_ptr,
    decay_ptr,
    states_ptr,
    stride_b,
    stride_l,
    length,
    heads,
    heads_per_group,
    head_dim,
    state,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q, p, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_head, in_state = p < head_dim, n < state
    chunks, row = tl.cdiv(length, CHUNK), sequence * heads + head
    x_ptr += sequence * stride_b + head * head_dim
    B_ptr += sequence * stride_b + (head // heads_per_group) * state
    dt_ptr += row * chunks * CHUNK
    decay_ptr += row * chunks * CHUNK
    states_ptr += row * chunks * state * head_dim
    held = in_state[:, None] & in_head[None, :]
    state_NP = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for chunk in range(chunks):
        entering = states_ptr + (chunk * state + n)[:, None] * head_dim + p[None, :]
        tl.store(entering, state_NP.to(states_ptr.dtype.element_ty), mask=held)
        reads = chunk * CHUNK + q
        x_QP = _tile(x_ptr, reads, stride_l, reads < length, p, 1, in_head)
        B_NQ = _tile(B_ptr, n, 1, in_state, reads, stride_l, reads < length)
        decay_Q, dt_Q = tl.load(decay_ptr + reads), tl.load(dt_ptr + reads)
        whole = tl.load(decay_ptr + chunk * CHUNK + CHUNK - 1)
        fed_QP = x_QP.to(tl.float32) * (tl.exp(whole - decay_Q) * dt_Q)[:, None]
        state_NP *= tl.exp(whole)
        state_NP = tl.dot(B_NQ, fed_QP.to(x_QP.dtype), state_NP, input_precision="ieee")


@triton.jit
def _output_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dt_ptr,
    decay_ptr,
    states_ptr,
    y_ptr,
    stride_b,
    stride_l,
    length,
    heads,
    heads_per_group,
    head_dim,
    state,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = tl.program_id(0) // (CHUNK // ROWS)
    first_head, sequence = tl.program_id(1) * HEADS, tl.program_id(2).to(tl.int64)
    r, q = (tl.program_id(0) % (CHUNK // ROWS)) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    reads, writes, in_head, in_state = chunk * CHUNK + q, chunk * CHUNK + r, p < head_dim, n < state
    x_ptr += sequence * stride_b
    group = sequence * stride_b + (first_head // heads_per_group) * state
    C_RN = _tile(C_ptr + group, writes, stride_l, writes < length, n, 1, in_state)
    B_NQ = _tile(B_ptr + group, n, 1, in_state, reads, stride_l, reads < length)
    scores_RQ = tl.dot(C_RN, B_NQ, input_precision="ieee")
    scores_RQ = tl.where(r[:, None] >= q[None, :], scores_RQ, 0.0)
    for head in range(first_head, first_head + HEADS):
        step = (sequence * heads + head) * tl.cdiv(length, CHUNK) + chunk
        decay_R = tl.load(decay_ptr + step * CHUNK + r)
        decay_Q, dt_Q = tl.load(decay_ptr + step * CHUNK + q), tl.load(dt_ptr + step * CHUNK + q)
        entering = states_ptr + step * state * head_dim
        state_NP = _tile(entering, n, head_dim, in_state, p, 1, in_head)
        x_QP = _tile(x_ptr + head * head_dim, reads, stride_l, reads < length, p, 1, in_head)
        x_RP = _tile(x_ptr + head * head_dim, writes, stride_l, writes < length, p, 1, in_head)
        # The minimum keeps masked scores, which are zero, from meeting an infinity.
        reach_RQ = tl.exp(tl.minimum(decay_R[:, None] - decay_Q[None, :], 0.0)) * dt_Q[None, :]
        y_RP = tl.dot(C_RN, state_NP, input_precision="ieee") * tl.exp(decay_R)[:, None]
        y_RP = tl.dot((scores_RQ * reach_RQ).to(x_QP.dtype), x_QP, y_RP, input_precision="ieee")
        y_RP += tl.load(D_ptr + head).to(tl.float32) * x_RP.to(tl.float32)
        rows = y_ptr + ((sequence * length + writes)[:, None] * heads + head) * head_dim
        written = (writes < length)[:, None] & in_head[None, :]
        tl.store(rows + p[None, :], y_RP.to(y_ptr.dtype.element_ty), mask=written)


@triton.jit
def _tile(ptr, rows, row_stride, in_rows, columns, column_stride, in_columns):
    """Part of a matrix, [rows, columns]; zeros outside of it."""
    offsets = (
        rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    )
    return tl.load(ptr + offsets, mask=in_rows[:, None] & in_columns[None, :], other=0.0)


@triton.jit
def _softplus(x):
    """`log(1 + exp(x))` that keeps small values' digits, which `1 +` alone would round away."""
    grown = tl.exp(x)
    sum_ = 1.0 + grown
    small = tl.where(sum_ == 1.0, grown, tl.log(sum_) * (grown / (sum_ - 1.0)))
    return tl.where(x > 20.0, x, small)
