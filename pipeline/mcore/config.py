"""From an `Architecture` to the TransformerConfig that megatron's parallel linears are built from.

In: architecture, degrees, compute dtype. Out: the config, the same for every layer type. Biases are
not set here: each linear takes its own from the architecture.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from pipeline.architecture import Architecture
from pipeline.sharding import ParallelDims


def transformer_config(
    architecture: Architecture, dims: ParallelDims, compute_dtype: torch.dtype
) -> TransformerConfig:
    """What a linear reads of it, and what the config's own checks ask for."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=architecture.hidden_size,
        # No linear reads these two, but megatron wants them divisible by the degree.
        num_attention_heads=dims.tp,
        kv_channels=architecture.head_dim,
        tensor_model_parallel_size=dims.tp,
        sequence_parallel=dims.tp > 1,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        params_dtype=compute_dtype,
        bf16=compute_dtype is torch.bfloat16,
    )
