"""What a server's products read instead of their inputs: quantized by calibrated scales, and back.

In: activations [..., K] of any float dtype and the fp32 scale that the checkpoint stores. Out: a
new tensor of the same shape and dtype that holds what the quantized values stand for; or what is
told of them: how many lie beyond a bound, how far they are from others.

**NVFP4** inputs get a scale per block of 16 while the server runs: `s = E4M3(min(a / (6 *
input_scale), 448))`, a true division, then E2M1 codes of `x / (s * input_scale)`. A block beyond
the calibrated amax saturates at it. A block so small that its `s` rounds to zero (up to 2**-10 /
448 of the calibrated amax) becomes zeros, as an all-zero one does: serving kernels and Model
Optimizer's simulation have it so, while the scale of a *weight* block is never below 2**-9. (Model
Optimizer also zeroes blocks whose `s * input_scale` is below 1e-5.)

**FP8** inputs, keys and values are `E4M3(x / scale) * scale`, saturating. Multiplying by a
reciprocal instead, as some kernels do, differs only where a quotient lies next to a rounding tie.

The result is rounded to the dtype of `x`: exact in fp32, 2**-8 at most in bf16.
Temporaries are of bounded size, whatever the size of `x` (one that is not contiguous is copied).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.errors import ConfigError, NumericsError
from pipeline.nvfp4 import kernels_activations, kernels_squares
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.codes import round_to_e2m1
from pipeline.nvfp4.formats import BLOCK_SIZE, E4M3_MAX
from pipeline.nvfp4.reference import encode_fp8
from pipeline.nvfp4.rows import row_chunks


def nvfp4_input(x: Tensor, input_scale: Tensor, backend: str) -> Tensor:
    """Quantize inputs to NVFP4 and back.

    Args:
        x: Float [..., K] with K a multiple of 16, finite; NaN stays NaN.
        input_scale: fp32 [], positive.
        backend: "reference" (plain torch, any device) or "triton" (a kernel, on a GPU); the bits
            are the same (a NaN spreads to its block in plain torch only).

    Raises:
        NumericsError: K is not a multiple of 16.
        ConfigError: Unknown backend, or the kernel is asked for without a GPU.
    """
    get_backend(backend)
    _check_blocks(x)
    # A scalar on the host would be applied as its reciprocal by CUDA: another last bit.
    scale = input_scale.to(x.device, torch.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if backend == "triton":
        _check_device(x)
        kernels_activations.quantize_blocks(x.detach().contiguous(), scale, out)
        return out
    for piece_RK, out_RK in _pieces(x, out):
        out_RK.copy_(_quantize_blocks(piece_RK.float(), scale))
    return out


def fp8_input(x: Tensor, scale: Tensor, backend: str) -> Tensor:
    """Quantize inputs, keys or values to E4M3 and back.

    Args:
        x: Float [..., K]; NaN stays NaN.
        scale: fp32 [], positive.
        backend: "reference" or "triton", as of `nvfp4_input`; the bits are the same.

    Raises:
        ConfigError: Unknown backend, or the kernel is asked for without a GPU.
    """
    get_backend(backend)
    scale = scale.to(x.device, torch.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if backend == "triton":
        _check_device(x)
        kernels_activations.quantize_fp8(x.detach().contiguous(), scale, out)
        return out
    for piece_RK, out_RK in _pieces(x, out):
        out_RK.copy_(encode_fp8(piece_RK, scale).float().mul_(scale))
    return out


def count_beyond(x: Tensor, amax: Tensor, backend: str) -> Tensor:
    """Count the elements of float [..., K] with `abs(x) > amax` (fp32 []): int64 []; NaN is not.

    Args:
        x: Float [..., K].
        amax: fp32 [].
        backend: "reference" or "triton", as of `nvfp4_input`; the counts are the same.

    Raises:
        ConfigError: Unknown backend, or the kernel is asked for without a GPU.
    """
    get_backend(backend)
    # Against a tensor without dims, bf16 would be compared in bf16: the bounds are made fp32 ones.
    amax = amax.to(x.device, torch.float32)
    if backend == "triton":
        _check_device(x)
        return kernels_activations.count_beyond(x.detach().contiguous(), amax)
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    for (piece_RK,) in _pieces(x):
        count += (piece_RK.abs().float() > amax).sum()
    return count


def sum_squares(
    x: Tensor, weights: Tensor, backend: str, subtracted: Tensor | None = None
) -> Tensor:
    """Sum the squares of activations, or of their differences from others: fp64 [].

    Args:
        x: Float [seq, batch, K].
        weights: Of each batch entry, [batch].
        backend: "reference" or "triton", as of `nvfp4_input`; they agree within 1e-6.
        subtracted: Others of the same shape.

    Raises:
        ConfigError: Unknown backend, or the kernel is asked for without a GPU.
    """
    get_backend(backend)
    if backend == "triton":
        _check_device(x)
        return (kernels_squares.sum_squares(x, subtracted) * weights).sum()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for column in range(x.shape[1]):
        part = x[:, column].float()
        if subtracted is not None:
            part = part - subtracted[:, column].float()
        total += part.square().sum(dtype=torch.float64) * weights[column]
    return total


def _quantize_blocks(x_RK: Tensor, scale: Tensor) -> Tensor:
    """The definition: fp32 rows to the fp32 values that their NVFP4 blocks stand for."""
    blocks_RBL = x_RK.unflatten(-1, (-1, BLOCK_SIZE))
    magnitude_RBL = blocks_RBL.abs()
    ratio_RB1 = magnitude_RBL.amax(-1, keepdim=True) / (scale * 6.0)
    scale_RB1 = ratio_RB1.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    value_RBL = round_to_e2m1(magnitude_RBL / scale_RB1).mul_(scale_RB1)
    value_RBL.masked_fill_(scale_RB1 == 0, 0.0)
    # Subtracted: a zero has no sign, as when code 8 is decoded.
    return torch.where(blocks_RBL < 0, 0.0 - value_RBL, value_RBL).flatten(-2)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each tensor, one piece after the other."""
    rows = [tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors]
    for chunk in row_chunks(rows[0]):
        yield tuple(part[chunk] for part in rows)


def _check_blocks(x: Tensor) -> None:
    if x.shape[-1] % BLOCK_SIZE:
        raise NumericsError(
            "input of an NVFP4 product",
            value=f"shape {list(x.shape)}",
            rule=f"blocks of {BLOCK_SIZE} lie along the last dim",
            remedy="keep this layer in BF16 or FP8, or cut it along K into fewer shards",
        )


def _check_device(x: Tensor) -> None:
    if not x.is_cuda:
        raise ConfigError(
            "backend",
            value=f"triton with activations on {x.device}",
            rule="its kernels run on a GPU",
            remedy='move the tensors to a CUDA device, or choose backend="reference"',
        )
