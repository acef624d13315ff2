"""NVFP4 and FP8 numerics: weights in, the bytes of a checkpoint out, and back.

`quantize_weight` and `dequantize_weight` do a whole weight at once and need nothing else of the
project. The sweep, which holds shards, calls the functions of `reference` with the amax of the
whole logical tensor.
"""

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.nvfp4.reference import PackedWeight, check_tensor_amax
from pipeline.nvfp4.rows import check_weight

__all__ = ["Format", "PackedWeight", "WeightMethod", "dequantize_weight", "quantize_weight"]


def quantize_weight(
    weight_NK: Tensor,
    method: WeightMethod | str = WeightMethod.four_over_six,
    backend: str = "reference",
) -> PackedWeight:
    """Quantize a whole weight to NVFP4.

    Args:
        weight_NK: bf16 (or fp32) [N, K] with K a multiple of 16; leading dims stack matrices.
        method: max, max_dynamic, four_over_six or mse.
        backend: What computes it: "reference" is plain torch on any device, "triton" kernels on a
            GPU; the bytes are the same.

    Returns:
        A record with codes, weight_scale and weight_scale_2.

    Raises:
        ConfigError: Unknown method or backend, or kernels are asked for without a GPU.
        NumericsError: The shape or dtype does not fit, or a weight is NaN or Inf.
    """
    if method not in list(WeightMethod):
        raise ConfigError(
            "method",
            value=method,
            rule=f"supported: {', '.join(WeightMethod)}",
            remedy="choose one of these",
        )
    chosen = get_backend(backend)
    check_weight(weight_NK, "weight_NK")
    amax = chosen.tensor_amax(weight_NK)
    check_tensor_amax(amax, "weight_NK")
    return chosen.quantize_nvfp4(weight_NK, amax, WeightMethod(method))


def dequantize_weight(
    packed: PackedWeight, dtype: torch.dtype = torch.float32, backend: str = "reference"
) -> Tensor:
    """Return the weight [..., N, K] of a record: exact in fp32, rounded once in others."""
    return get_backend(backend).dequantize_nvfp4(packed, dtype)
