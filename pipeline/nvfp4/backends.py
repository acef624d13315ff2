"""What computes the numerics: plain torch on any device, or Triton kernels on a GPU.

A caller picks a backend by name and calls its functions with weights [..., N, K] and amax [...]
on one device. Results stay there and nothing waits for the device. Both backends give the same
bytes and counts; sums of squared errors agree within 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.nvfp4 import (
    kernels_amax,
    kernels_dequantize,
    kernels_fp8,
    kernels_nvfp4,
    reference,
    statistics,
)
from pipeline.nvfp4.formats import BLOCK_SIZE, HOPPER_FLUSH_BELOW, WeightMethod
from pipeline.nvfp4.reference import PackedWeight
from pipeline.nvfp4.statistics import WeightStatistics


class PackedFp8(NamedTuple):
    """An FP8 weight and what storing it cost.

    Attributes:
        codes: float8_e4m3fn [..., N, K].
        weight_scale: fp32 [...], one scale per matrix.
        squared_error: fp64 [...], sum of (dequantized - weight)**2.
        squared_weight: fp64 [...], sum of weight**2.
    """

    codes: Tensor
    weight_scale: Tensor
    squared_error: Tensor
    squared_weight: Tensor


class Backend(Protocol):
    """The functions of a backend; all raise NumericsError where a shape or dtype does not fit."""

    def tensor_amax(self, weight: Tensor) -> Tensor:
        """Return the amax of each matrix at hand, fp32 [...]; NaN or Inf where a weight is."""

    def quantize_nvfp4(
        self, weight: Tensor, tensor_amax: Tensor, method: WeightMethod
    ) -> PackedWeight:
        """Choose block scales by `method` and pack, as `pack_nvfp4` does, without its figures."""

    def pack_nvfp4(
        self,
        weight: Tensor,
        tensor_amax: Tensor,
        method: WeightMethod,
        *,
        compare_to_max: bool = False,
        out: PackedWeight | None = None,
    ) -> tuple[PackedWeight, WeightStatistics]:
        """Choose block scales by `method`, pack and measure.

        Args:
            weight: bf16 or fp32 [..., N, K], finite, K a multiple of 16.
            tensor_amax: fp32 [...], of whole logical tensors.
            method: How block scales are chosen.
            compare_to_max: Fill `squared_error_of_max`; else it equals `squared_error`.
            out: Contiguous tensors of the result's shapes and dtypes to write into.
        """

    def pack_fp8(self, weight: Tensor, tensor_amax: Tensor, out: Tensor | None = None) -> PackedFp8:
        """Store as E4M3, saturating, and measure; `out`: contiguous codes to write into."""

    def fp8_squared_errors(
        self, weight: Tensor, tensor_amax: Tensor, multipliers: Sequence[float]
    ) -> Tensor:
        """Return what each amax multiplier would cost, fp64 [..., T]."""

    def dequantize_nvfp4(
        self,
        packed: PackedWeight,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the weights [..., N, K] that a packed weight stands for.

        Args:
            packed: Codes and scales.
            dtype: Of the weights.
            out: Contiguous weights [..., N, K] of that dtype to write into.
        """

    def zero_flushed(self, weight: Tensor, weight_scale: Tensor) -> None:
        """Zero, in place, the blocks whose scales Hopper's weight-only kernels flush to zero.

        Args:
            weight: Contiguous [..., N, K], dequantized.
            weight_scale: float8_e4m3fn [..., N, K/16], its block scales.
        """


def get_backend(name: str) -> Backend:
    """Return the backend of this name: "reference" or "triton".

    Raises:
        ConfigError: There is no such backend.
    """
    if name not in _BACKENDS:
        raise ConfigError(
            "backend",
            value=name,
            rule=f"supported: {', '.join(_BACKENDS)}",
            remedy="choose one of these",
        )
    return _BACKENDS[name]


class _Reference:
    """Plain torch, on any device."""

    def tensor_amax(self, weight: Tensor) -> Tensor:
        return reference.tensor_amax(weight)

    def quantize_nvfp4(
        self, weight: Tensor, tensor_amax: Tensor, method: WeightMethod
    ) -> PackedWeight:
        return reference.quantize_nvfp4(weight, tensor_amax, method)

    def pack_nvfp4(
        self,
        weight: Tensor,
        tensor_amax: Tensor,
        method: WeightMethod,
        *,
        compare_to_max: bool = False,
        out: PackedWeight | None = None,
    ) -> tuple[PackedWeight, WeightStatistics]:
        packed = reference.quantize_nvfp4(weight, tensor_amax, method)
        measured = statistics.measure_statistics(
            weight, packed, tensor_amax, method, compare_to_max
        )
        if out is None:
            return packed, measured
        out.codes.copy_(packed.codes)
        out.weight_scale.view(torch.uint8).copy_(packed.weight_scale.view(torch.uint8))
        out.weight_scale_2.copy_(packed.weight_scale_2)
        return out, measured

    def pack_fp8(self, weight: Tensor, tensor_amax: Tensor, out: Tensor | None = None) -> PackedFp8:
        codes, weight_scale = reference.quantize_fp8(weight, tensor_amax)
        error = reference.fp8_squared_errors(weight, tensor_amax, (1.0,))[..., 0]
        if out is not None:
            out.view(torch.uint8).copy_(codes.view(torch.uint8))
            codes = out
        return PackedFp8(codes, weight_scale, error, statistics.squared_weight(weight))

    def fp8_squared_errors(
        self, weight: Tensor, tensor_amax: Tensor, multipliers: Sequence[float]
    ) -> Tensor:
        return reference.fp8_squared_errors(weight, tensor_amax, multipliers)

    def dequantize_nvfp4(
        self,
        packed: PackedWeight,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        weight = reference.dequantize_nvfp4(packed, dtype)
        return weight if out is None else out.copy_(weight)

    def zero_flushed(self, weight: Tensor, weight_scale: Tensor) -> None:
        is_flushed = weight_scale.to(torch.float32) < HOPPER_FLUSH_BELOW
        weight.unflatten(-1, (-1, BLOCK_SIZE)).masked_fill_(is_flushed.unsqueeze(-1), 0.0)


class _Triton:
    """Kernels, one launch per call, for tensors on a GPU."""

    def tensor_amax(self, weight: Tensor) -> Tensor:
        _check_device(weight)
        return kernels_amax.tensor_amax(weight)

    def quantize_nvfp4(
        self, weight: Tensor, tensor_amax: Tensor, method: WeightMethod
    ) -> PackedWeight:
        return self.pack_nvfp4(weight, tensor_amax, method)[0]

    def pack_nvfp4(
        self,
        weight: Tensor,
        tensor_amax: Tensor,
        method: WeightMethod,
        *,
        compare_to_max: bool = False,
        out: PackedWeight | None = None,
    ) -> tuple[PackedWeight, WeightStatistics]:
        _check_device(weight)
        return kernels_nvfp4.pack_nvfp4(
            weight, tensor_amax, method, compare_to_max=compare_to_max, out=out
        )

    def pack_fp8(self, weight: Tensor, tensor_amax: Tensor, out: Tensor | None = None) -> PackedFp8:
        _check_device(weight)
        return PackedFp8(*kernels_fp8.pack_fp8(weight, tensor_amax, out))

    def fp8_squared_errors(
        self, weight: Tensor, tensor_amax: Tensor, multipliers: Sequence[float]
    ) -> Tensor:
        _check_device(weight)
        return kernels_fp8.fp8_squared_errors(weight, tensor_amax, multipliers)

    def dequantize_nvfp4(
        self,
        packed: PackedWeight,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        _check_device(packed.codes)
        return kernels_dequantize.dequantize_nvfp4(packed, dtype, out)

    def zero_flushed(self, weight: Tensor, weight_scale: Tensor) -> None:
        _check_device(weight)
        kernels_dequantize.zero_flushed(weight, weight_scale)


def _check_device(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise ConfigError(
            "backend",
            value=f"triton with tensors on {tensor.device}",
            rule="its kernels run on a GPU",
            remedy='move the tensors to a CUDA device, or choose backend="reference"',
        )


_BACKENDS: dict[str, Backend] = {"reference": _Reference(), "triton": _Triton()}
