"""From an `Architecture` to megatron's TransformerConfig, one per layer type.

In: architecture, degrees, device, compute dtype. Out: the config that megatron's modules of this
layer type are built from. Biases are not set here: the modules of this package take them from the
architecture, since megatron's one flag for all of them would also give the router a bias.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig

from pipeline.architecture import Architecture, LayerType
from pipeline.sharding import ParallelDims


def transformer_config(
    architecture: Architecture,
    layer_type: LayerType,
    dims: ParallelDims,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> TransformerConfig:
    """The config of one layer type; a single layer without dropout, initialization or RoPE."""
    a = architecture
    own: dict[str, Any] = {}
    if layer_type is LayerType.mamba:
        own = _mamba(a)
    elif layer_type is LayerType.moe:
        own = _moe(a, dims, device)
    return TransformerConfig(
        num_layers=1,
        hidden_size=a.hidden_size,
        # Only megatron's own attention reads these two; ours reads the architecture.
        num_attention_heads=dims.tp,
        kv_channels=a.head_dim,
        ffn_hidden_size=max(a.intermediate_size, a.moe_intermediate_size, dims.tp),
        tensor_model_parallel_size=dims.tp,
        sequence_parallel=dims.tp > 1,
        normalization="RMSNorm",
        layernorm_epsilon=a.layer_norm_epsilon,
        activation_func=squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        params_dtype=compute_dtype,
        bf16=compute_dtype is torch.bfloat16,
        **own,
    )


def _mamba(a: Architecture) -> dict[str, Any]:
    return {
        "mamba_num_heads": a.mamba_num_heads,
        "mamba_head_dim": a.mamba_head_dim,
        "mamba_state_dim": a.ssm_state_size,
        "mamba_num_groups": a.n_groups,
        # The fused path hides out_proj's input from the taps and needs causal-conv1d.
        "use_mamba_mem_eff_path": False,
    }


def _moe(a: Architecture, dims: ParallelDims, device: torch.device) -> dict[str, Any]:
    """No auxiliary loss, no capacity: every token reaches all of its experts.

    The latent width is not named: megatron would insist on Transformer Engine for it.
    """
    shared = a.moe_shared_expert_intermediate_size if a.has_shared_experts else None
    return {
        "expert_model_parallel_size": dims.ep,
        "expert_tensor_parallel_size": dims.etp,
        "num_moe_experts": a.n_routed_experts,
        "moe_router_topk": a.num_experts_per_tok,
        "moe_ffn_hidden_size": a.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_overlap": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": a.routed_scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_permute_fusion": False,
        "moe_grouped_gemm": False,
        # gloo has no all-to-all over CUDA streams, which megatron's dispatcher takes for granted.
        "moe_token_dispatcher_type": "alltoall" if device.type == "cuda" else "allgather",
    }
