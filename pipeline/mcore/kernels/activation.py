# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Squared ReLU in place, and the largest magnitude of a tensor, in one pass over memory each.

In: contiguous activations of any float dtype. Out: the activations squared in place; a running
amax, fp32 [1], raised. A maximum does not depend on the order in which blocks arrive, so that
atomics give the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 8192
_WARPS = 8


def relu_squared_(x: torch.Tensor, amax: torch.Tensor | None = None) -> torch.Tensor:
    """`relu(x)**2` in place; each product is computed in fp32 and rounded once to `x.dtype`.

    Args:
        x: Contiguous activations of any shape; NaN stays NaN.
        amax: Running amax, fp32 [1] on the device of `x`, to be raised by the largest output
            (by inf where one is NaN).

    Returns:
        `x` itself.
    """
    if x.is_cuda:
        return _square_on_gpu(x, amax)
    x.relu_().square_()
    if amax is not None:
        raise_amax(x, amax)
    return x


def raise_amax(x: torch.Tensor, amax: torch.Tensor) -> None:
    """Raises `amax`, fp32 [1], by the magnitudes in `x` (contiguous); NaN raises it to inf."""
    if x.is_cuda:
        _raise_on_gpu(x, amax)
    elif x.numel():
        largest = x.detach().abs().amax().float().nan_to_num(nan=torch.inf, posinf=torch.inf)
        torch.maximum(amax, largest, out=amax)


def ordered_bits(amax: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """`amax` as int32: the bits of floats that are not negative are ordered like the floats.

    A kernel needs some pointer where there is no amax: any tensor will do.
    """
    if amax is None:
        return unused
    assert amax.dtype is torch.float32
    assert amax.numel() == 1
    return amax.view(torch.int32)


def _square_on_gpu(x: torch.Tensor, amax: torch.Tensor | None) -> torch.Tensor:
    assert x.is_contiguous()
    if x.numel():
        _relu_squared_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x,
            ordered_bits(amax, x),
            x.numel(),
            HAS_AMAX=amax is not None,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return x


def _raise_on_gpu(x: torch.Tensor, amax: torch.Tensor) -> None:
    assert x.is_contiguous()
    if x.numel():
        _amax_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, ordered_bits(amax, x), x.numel(), BLOCK=_BLOCK, num_warps=_WARPS
        )


@triton.jit
def raise_to_largest(amax_bits_ptr, values):
    """Raises the amax by the magnitudes of a block of fp32 values; masked ones must be 0."""
    magnitudes = tl.abs(values)
    magnitudes = tl.where(magnitudes == magnitudes, magnitudes, float("inf"))
    bits = tl.max(tl.ravel(magnitudes), axis=0).to(tl.int32, bitcast=True)
    # Most blocks raise nothing: reading first spares them the atomic. A stale value is too low at
    # worst, never too high.
    tl.atomic_max(amax_bits_ptr, bits, mask=bits > tl.load(amax_bits_ptr))


@triton.jit
def _relu_squared_kernel(x_ptr, amax_bits_ptr, size, HAS_AMAX: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x < 0.0, 0.0, x)  # tl.maximum would lose NaN
    squared = (x * x).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + offsets, squared, mask=inside)
    if HAS_AMAX:
        raise_to_largest(amax_bits_ptr, squared.to(tl.float32))


@triton.jit
def _amax_kernel(x_ptr, amax_bits_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
    raise_to_largest(amax_bits_ptr, values.to(tl.float32))
