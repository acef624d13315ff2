# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""RMS norms in one pass over memory: fp32 inside, rounded once, largest output on the way.

In: activations on a GPU, in any float dtype and with any strides but a contiguous last dim.
Out: contiguous activations of the same dtype; a running amax, fp32 [1], raised where one is given.
The meaning in plain torch is in `pipeline.mcore.norms`. One program adds up one whole row (or one
group of it), so that the order of the additions depends on the width alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.mcore.kernels.activation import ordered_bits, raise_to_largest


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, amax: torch.Tensor | None = None
) -> torch.Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dim.

    Args:
        x: Contiguous [..., width].
        weight: [width], any float dtype.
        eps: Added to the mean square.
        amax: Running amax, fp32 [1], to be raised by the largest output (by inf where one is NaN).

    Returns:
        The shape and dtype of `x`.
    """
    assert x.is_contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    block, rows = triton.next_power_of_2(width), x.numel() // width
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            weight,
            out,
            ordered_bits(amax, x),
            width,
            eps,
            HAS_AMAX=amax is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


def gated_rms_norm(
    x_bld: torch.Tensor,
    z_bld: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    *,
    out_bld: torch.Tensor,
    amax: torch.Tensor | None = None,
) -> None:
    """Gates with silu(z), then normalizes each group of channels.

    Args:
        x_bld: [batch, seq, channels]; only the last dim need be contiguous, here and below.
        z_bld: The gate, of the same shape.
        weight: [channels], any float dtype.
        eps: Added to the mean square.
        group_size: Channels per group.
        out_bld: Where the result goes.
        amax: Running amax, fp32 [1], to be raised by the largest output (by inf where one is NaN).
    """
    batch, length, channels = x_bld.shape
    assert x_bld.shape == z_bld.shape == out_bld.shape
    assert x_bld.stride(-1) == z_bld.stride(-1) == out_bld.stride(-1) == 1
    groups, rest = divmod(channels, group_size)
    assert rest == 0
    block = triton.next_power_of_2(group_size)
    if batch * length:
        _gated_rms_norm_kernel[(batch * length * groups,)](
            x_bld,
            z_bld,
            weight,
            out_bld,
            ordered_bits(amax, x_bld),
            *(x_bld.stride(0), x_bld.stride(1), z_bld.stride(0), z_bld.stride(1)),
            *(out_bld.stride(0), out_bld.stride(1)),
            batch,
            groups,
            group_size,
            eps,
            HAS_AMAX=amax is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )


def _warps(block: int) -> int:
    """At least four, and so many that a thread holds at most 32 elements."""
    return min(max(block // 1024, 4), 32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    amax_bits_ptr,
    width,
    eps,
    HAS_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row + columns, out, mask=inside)
    if HAS_AMAX:
        raise_to_largest(amax_bits_ptr, out.to(tl.float32))


@triton.jit
def _gated_rms_norm_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    amax_bits_ptr,
    x_stride_b,
    x_stride_l,
    z_stride_b,
    z_stride_l,
    out_stride_b,
    out_stride_l,
    batch,
    groups,
    group_size,
    eps,
    HAS_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Groups of one position first, then the batch: neighbours in time are neighbours in memory.
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    position = (row // batch).to(tl.int64)
    sequence = (row % batch).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < group_size
    channels = group * group_size + columns
    x_row = x_ptr + sequence * x_stride_b + position * x_stride_l
    z_row = z_ptr + sequence * z_stride_b + position * z_stride_l
    out_row = out_ptr + sequence * out_stride_b + position * out_stride_l
    x = tl.load(x_row + channels, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_row + channels, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    gated = x * (z * tl.sigmoid(z))
    scale = tl.rsqrt(tl.sum(gated * gated, axis=0) / group_size + eps)
    out = (gated * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_row + channels, out, mask=inside)
    if HAS_AMAX:
        raise_to_largest(amax_bits_ptr, out.to(tl.float32))
