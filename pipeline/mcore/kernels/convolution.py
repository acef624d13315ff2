# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Mamba's causal depthwise convolution with its activation, in one pass over memory.

In: the channels [x, B, C] as in_proj leaves them, a slice of wider rows, read in place. Out: the
same channels, contiguous, as the scan reads them. Sums are fp32, in the order of the taps, and the
result is rounded once after the activation, as servers do it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_POSITIONS, _CHANNELS, _WARPS = 32, 128, 4


def convolve(x_bld: torch.Tensor, weight_dw: torch.Tensor, bias_d: torch.Tensor) -> torch.Tensor:
    """`silu(bias + sum over w of weight[:, w] * x[l - (width - 1) + w])`, zero before the start.

    Args:
        x_bld: [batch, seq, channels]; only the last dim need be contiguous.
        weight_dw: [channels, width], contiguous, any float dtype.
        bias_d: [channels].

    Returns:
        Contiguous [batch, seq, channels] in the dtype of `x_bld`.
    """
    convolve_here = _convolve_on_gpu if x_bld.is_cuda else _convolve_in_torch
    return convolve_here(x_bld, weight_dw, bias_d)


def _convolve_in_torch(
    x_bld: torch.Tensor, weight_dw: torch.Tensor, bias_d: torch.Tensor
) -> torch.Tensor:
    length, width = x_bld.shape[1], weight_dw.shape[1]
    padded_bld = F.pad(x_bld.float(), (0, 0, width - 1, 0))
    sum_bld = bias_d.float().expand(x_bld.shape)
    for tap in range(width):
        sum_bld = sum_bld + weight_dw[:, tap].float() * padded_bld[:, tap : tap + length]
    return F.silu(sum_bld).to(x_bld.dtype)


def _convolve_on_gpu(
    x_bld: torch.Tensor, weight_dw: torch.Tensor, bias_d: torch.Tensor
) -> torch.Tensor:
    batch, length, channels = x_bld.shape
    assert x_bld.stride(-1) == bias_d.stride(-1) == 1
    assert weight_dw.is_contiguous()
    out_bld = torch.empty(x_bld.shape, dtype=x_bld.dtype, device=x_bld.device)
    grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _POSITIONS), batch)
    if out_bld.numel():
        _convolution_kernel[grid](
            x_bld,
            weight_dw,
            bias_d,
            out_bld,
            x_bld.stride(0),
            x_bld.stride(1),
            length,
            channels,
            WIDTH=weight_dw.shape[1],
            POSITIONS=_POSITIONS,
            CHANNELS=_CHANNELS,
            num_warps=_WARPS,
        )
    return out_bld


@triton.jit
def _convolution_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_stride_b,
    x_stride_l,
    length,
    channels,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    positions = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    sequence = tl.program_id(2).to(tl.int64)
    exists = columns < channels
    sums = tl.zeros((POSITIONS, CHANNELS), dtype=tl.float32)
    sums += tl.load(bias_ptr + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    x_rows = x_ptr + sequence * x_stride_b + columns[None, :]
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + columns * WIDTH + tap, mask=exists, other=0.0).to(tl.float32)
        read = positions - (WIDTH - 1) + tap
        inside = ((read >= 0) & (read < length))[:, None] & exists[None, :]
        offsets = read.to(tl.int64)[:, None] * x_stride_l
        # Only the first load of a row comes from memory; the others find it in the cache.
        sums += weight[None, :] * tl.load(x_rows + offsets, mask=inside, other=0.0).to(tl.float32)
    activated = sums * tl.sigmoid(sums)
    out_rows = out_ptr + (sequence * length + positions.to(tl.int64)[:, None]) * channels
    inside = (positions < length)[:, None] & exists[None, :]
    tl.store(out_rows + columns[None, :], activated.to(out_ptr.dtype.element_ty), mask=inside)
