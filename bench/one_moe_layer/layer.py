"""One MoE layer of a chosen width: its configuration, its random weights and its calibration input.

In: a shape and a seed. Out: the same tensors, bit for bit, in every process that asks for them on
the same device: each tensor has a generator of its own, seeded by its name. Two programs can so
hold the same layer without handing 22 GB over.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch

from pipeline.architecture import Architecture, TensorSpec, layer_tensors

LAYER = 0
VOCABULARY = 64
EPSILON = 1e-5
# Weights are a normal number times exp(TAIL * another one): tails like those of trained weights,
# so that blocks choose either multiplier and FP8 tensors have outliers.
TAIL = 0.4


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths of the layer, and the length of a calibration sequence."""

    hidden: int
    experts: int
    top_k: int
    latent: int
    expert_width: int
    shared_width: int
    seq_len: int


SHAPES = {
    "ultra": Shape(8192, 512, 22, 2048, 5120, 10240, 4096),
    # An eighth of every width, for a GPU of 24 GB.
    "eighth": Shape(1024, 128, 22, 256, 640, 1280, 4096),
    "small": Shape(64, 8, 3, 32, 64, 96, 128),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The layer on one device.

    Attributes:
        shape: Its widths.
        device: Where tensors are made.
        seed: Another seed gives another layer.
    """

    shape: Shape
    device: torch.device
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """config.json of a model that has this layer only, and hardly a vocabulary."""
        shape = self.shape
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "hybrid_override_pattern": "E",
            "dtype": "bfloat16",
            "hidden_size": shape.hidden,
            "vocab_size": VOCABULARY,
            "layer_norm_epsilon": EPSILON,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": shape.hidden // 2,
            "mamba_num_heads": 2,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "intermediate_size": shape.expert_width,
            "n_routed_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "moe_intermediate_size": shape.expert_width,
            "moe_latent_size": shape.latent,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": shape.shared_width,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 5.0,
            "mlp_bias": False,
            "mlp_hidden_act": "relu2",
            "tie_word_embeddings": False,
        }

    @property
    def architecture(self) -> Architecture:
        """What `pipeline` makes of the configuration."""
        return Architecture.from_hf_config(self.config)

    @property
    def tensors(self) -> list[TensorSpec]:
        """Every tensor of the layer, in model order."""
        return layer_tensors(self.architecture, LAYER)

    @property
    def export_bytes(self) -> int:
        """About what an export of the layer weighs: routed experts NVFP4, shared FP8, rest BF16."""
        bits = {"routed_expert": 4.5, "shared_expert": 8.0, "gate": 32.0}
        return int(sum(spec.parameters * bits.get(spec.role, 16.0) / 8 for spec in self.tensors))

    def weight(self, spec: TensorSpec) -> torch.Tensor:
        """One tensor: BF16, the router's in FP32."""
        generator = self._generator(spec.name)
        normal = torch.randn(spec.shape, generator=generator, device=self.device)
        if spec.name.endswith("e_score_correction_bias"):
            return normal.mul_(0.01)
        if spec.name.endswith("norm.weight"):
            return normal.mul_(0.1).add_(1.0).bfloat16()
        columns = math.prod(spec.shape[1:])
        if spec.name.endswith("gate.weight"):
            return normal.div_(math.sqrt(columns))
        spread = torch.randn(spec.shape, generator=generator, device=self.device)
        normal.mul_(spread.mul_(TAIL).exp_()).div_(math.sqrt(columns))
        return normal.bfloat16()

    def sequences(self, count: int) -> list[torch.Tensor]:
        """Hidden states that reach the layer: `count` sequences, bf16 [seq_len, hidden] each."""
        generator = self._generator("hidden")
        scale = torch.randn(self.shape.hidden, generator=generator, device=self.device).exp_()
        size = (self.shape.seq_len, self.shape.hidden)
        return [
            torch.randn(size, generator=generator, device=self.device).mul_(scale).bfloat16()
            for _ in range(count)
        ]

    def _generator(self, name: str) -> torch.Generator:
        seed = self.seed << 32 | zlib.crc32(name.encode())
        return torch.Generator(self.device).manual_seed(seed)
