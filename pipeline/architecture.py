"""What a Nemotron-H config.json says: the layers, and every tensor with its shape.

In: the parsed config.json (NVIDIA's or transformers' vocabulary). Out: an `Architecture` and the
list of tensors that a checkpoint of it must hold. Pure arithmetic; reads no weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from pipeline.errors import ArchitectureError
from pipeline.hf_config import LayerType as LayerType
from pipeline.hf_config import read_values


class Role(StrEnum):
    """What a tensor is for; recipes, reports and shard rules speak of roles."""

    routed_expert = "routed_expert"
    shared_expert = "shared_expert"
    latent = "latent"
    gate = "gate"
    mamba_in = "mamba_in"
    mamba_out = "mamba_out"
    mamba_other = "mamba_other"
    attention_qkv = "attention_qkv"
    attention_out = "attention_out"
    mlp = "mlp"
    norm = "norm"
    embedding = "embedding"
    head = "head"
    mtp = "mtp"
    bias = "bias"


LINEAR_ROLES = frozenset(
    {
        Role.routed_expert,
        Role.shared_expert,
        Role.latent,
        Role.mamba_in,
        Role.mamba_out,
        Role.attention_qkv,
        Role.attention_out,
        Role.mlp,
    }
)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor that the checkpoint must hold.

    Attributes:
        name: Full Hugging Face name.
        shape: Logical (unsharded) shape.
        role: What the tensor is for.
        layer: Index of its layer, or None outside the layers.
        keeps_source_dtype: Whether the slot keeps the source's dtype (router, `A_log`, `D`,
            `dt_bias`, correction bias) instead of the compute dtype.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    keeps_source_dtype: bool = False

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor: the name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def is_linear_weight(self) -> bool:
        """Whether this is the weight matrix of a projection that a recipe may quantize."""
        return self.role in LINEAR_ROLES and self.name.endswith(".weight")

    @property
    def is_routed_expert(self) -> bool:
        """Whether the tensor belongs to one routed expert."""
        return self.role is Role.routed_expert

    @property
    def expert(self) -> int:
        """Index of the routed expert that owns the tensor."""
        return int(self.name.split(".experts.")[1].split(".")[0])

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a Nemotron-H model; fields are named as in NVIDIA's config.json."""

    hidden_size: int
    vocab_size: int
    layers: tuple[LayerType, ...]
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 128
    attention_bias: bool = False
    mamba_num_heads: int = 1
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    use_conv_bias: bool = True
    use_bias: bool = False
    n_routed_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    moe_latent_size: int | None = None
    n_shared_experts: int = 1
    moe_shared_expert_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    intermediate_size: int = 0
    mlp_bias: bool = False
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    mtp_layers: tuple[LayerType, ...] = ()

    @property
    def mamba_intermediate_size(self) -> int:
        """Width of the Mamba mixer: heads times head dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_parts(self) -> tuple[int, int, int]:
        """Rows of conv1d: `[x, B, C]`."""
        state = self.n_groups * self.ssm_state_size
        return (self.mamba_intermediate_size, state, state)

    @property
    def mamba_in_parts(self) -> tuple[int, int, int, int, int]:
        """Rows of in_proj: `[z, x, B, C, dt]`."""
        return (self.mamba_intermediate_size, *self.mamba_conv_parts, self.mamba_num_heads)

    @property
    def expert_input_size(self) -> int:
        """Width of what a routed expert reads and writes: the latent width where there is one."""
        return self.moe_latent_size or self.hidden_size

    @property
    def has_shared_experts(self) -> bool:
        """Whether MoE layers hold a shared expert."""
        return self.n_shared_experts > 0 and self.moe_shared_expert_intermediate_size > 0

    def layers_of(self, layer_type: LayerType) -> list[int]:
        """Indices of the layers of one type."""
        return [index for index, kind in enumerate(self.layers) if kind is layer_type]

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Reads a config.json.

        Raises:
            ArchitectureError: Not a nemotron_h model, a missing or impossible value, or a
                setting that the forward pass does not implement.
        """
        architecture = cls(**read_values(config, dataclasses.fields(cls)))
        _check_arithmetic(architecture)
        return architecture


def expected_tensors(architecture: Architecture) -> list[TensorSpec]:
    """Every tensor of the model but `mtp.*`, in the order of the forward pass."""
    a = architecture
    specs = [
        TensorSpec("backbone.embeddings.weight", (a.vocab_size, a.hidden_size), Role.embedding)
    ]
    for index in range(len(a.layers)):
        specs += layer_tensors(a, index)
    specs.append(TensorSpec("backbone.norm_f.weight", (a.hidden_size,), Role.norm))
    if not a.tie_word_embeddings:
        specs.append(TensorSpec("lm_head.weight", (a.vocab_size, a.hidden_size), Role.head))
    return specs


def layer_tensors(architecture: Architecture, layer: int) -> list[TensorSpec]:
    """The tensors of one layer: its norm first, then its mixer."""
    prefix = f"backbone.layers.{layer}"
    kind = architecture.layers[layer]
    norm = TensorSpec(f"{prefix}.norm.weight", (architecture.hidden_size,), Role.norm, layer)
    return [norm, *_MIXERS[kind](architecture, f"{prefix}.mixer", layer)]


def mtp_tensors(architecture: Architecture) -> list[TensorSpec]:
    """The multi-token-prediction block as NVIDIA names it; used where only a config is known."""
    a = architecture
    specs: list[TensorSpec] = []
    if a.num_nextn_predict_layers < 1:
        return specs
    hidden = (a.hidden_size,)
    last = len(a.mtp_layers) - 1
    for index, kind in enumerate(a.mtp_layers):
        prefix = f"mtp.layers.{index}"
        if index == 0:
            specs += [
                TensorSpec(f"{prefix}.enorm.weight", hidden, Role.mtp),
                TensorSpec(f"{prefix}.hnorm.weight", hidden, Role.mtp),
                TensorSpec(
                    f"{prefix}.eh_proj.weight", (a.hidden_size, 2 * a.hidden_size), Role.mtp
                ),
            ]
        specs.append(TensorSpec(f"{prefix}.norm.weight", hidden, Role.mtp))
        for spec in _MIXERS[kind](a, f"{prefix}.mixer", 0):
            specs.append(dataclasses.replace(spec, role=Role.mtp, layer=None))
        if index == last:
            specs.append(TensorSpec(f"{prefix}.final_layernorm.weight", hidden, Role.mtp))
    return specs


def _linear(
    name: str, rows: int, columns: int, role: Role, layer: int, bias: bool = False
) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (rows, columns), role, layer)
    if bias:
        yield TensorSpec(f"{name}.bias", (rows,), Role.bias, layer)


def _mamba(a: Architecture, prefix: str, layer: int) -> Iterator[TensorSpec]:
    width, heads, channels = a.mamba_intermediate_size, a.mamba_num_heads, sum(a.mamba_conv_parts)
    yield from _linear(
        f"{prefix}.in_proj", sum(a.mamba_in_parts), a.hidden_size, Role.mamba_in, layer, a.use_bias
    )
    other = Role.mamba_other
    yield TensorSpec(f"{prefix}.conv1d.weight", (channels, 1, a.conv_kernel), other, layer)
    if a.use_conv_bias:
        yield TensorSpec(f"{prefix}.conv1d.bias", (channels,), other, layer)
    for name in ("A_log", "D", "dt_bias"):
        yield TensorSpec(f"{prefix}.{name}", (heads,), other, layer, keeps_source_dtype=True)
    yield TensorSpec(f"{prefix}.norm.weight", (width,), other, layer)
    yield from _linear(
        f"{prefix}.out_proj", a.hidden_size, width, Role.mamba_out, layer, a.use_bias
    )


def _attention(a: Architecture, prefix: str, layer: int) -> Iterator[TensorSpec]:
    queries = a.num_attention_heads * a.head_dim
    keys = a.num_key_value_heads * a.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _linear(
            f"{prefix}.{name}", rows, a.hidden_size, Role.attention_qkv, layer, a.attention_bias
        )
    yield from _linear(
        f"{prefix}.o_proj", a.hidden_size, queries, Role.attention_out, layer, a.attention_bias
    )


def _mlp(a: Architecture, prefix: str, layer: int) -> Iterator[TensorSpec]:
    width = a.intermediate_size
    yield from _linear(f"{prefix}.up_proj", width, a.hidden_size, Role.mlp, layer, a.mlp_bias)
    yield from _linear(f"{prefix}.down_proj", a.hidden_size, width, Role.mlp, layer, a.mlp_bias)


def _moe(a: Architecture, prefix: str, layer: int) -> Iterator[TensorSpec]:
    experts, hidden, latent = a.n_routed_experts, a.hidden_size, a.expert_input_size
    gate = f"{prefix}.gate"
    yield TensorSpec(f"{gate}.weight", (experts, hidden), Role.gate, layer, keeps_source_dtype=True)
    yield TensorSpec(
        f"{gate}.e_score_correction_bias", (experts,), Role.gate, layer, keeps_source_dtype=True
    )
    if a.moe_latent_size is not None:
        yield from _linear(
            f"{prefix}.fc1_latent_proj", latent, hidden, Role.latent, layer, a.mlp_bias
        )
        yield from _linear(
            f"{prefix}.fc2_latent_proj", hidden, latent, Role.latent, layer, a.mlp_bias
        )
    if a.has_shared_experts:
        width, name, role = (
            a.moe_shared_expert_intermediate_size,
            "shared_experts",
            Role.shared_expert,
        )
        yield from _linear(f"{prefix}.{name}.up_proj", width, hidden, role, layer, a.mlp_bias)
        yield from _linear(f"{prefix}.{name}.down_proj", hidden, width, role, layer, a.mlp_bias)
    width, role = a.moe_intermediate_size, Role.routed_expert
    for expert in range(experts):
        yield from _linear(f"{prefix}.experts.{expert}.up_proj", width, latent, role, layer)
        yield from _linear(f"{prefix}.experts.{expert}.down_proj", latent, width, role, layer)


_MIXERS = {
    LayerType.mamba: _mamba,
    LayerType.attention: _attention,
    LayerType.moe: _moe,
    LayerType.mlp: _mlp,
}


def _check_arithmetic(a: Architecture) -> None:
    def refuse(what: str, value: object, rule: str) -> None:
        raise ArchitectureError(
            f"config.json {what}",
            value=value,
            rule=rule,
            remedy="restore the config.json that belongs to this checkpoint",
        )

    if LayerType.attention in a.layers and a.num_attention_heads % a.num_key_value_heads:
        refuse(
            "num_attention_heads",
            a.num_attention_heads,
            f"must be a multiple of num_key_value_heads={a.num_key_value_heads}",
        )
    if LayerType.mamba in a.layers and a.mamba_num_heads % a.n_groups:
        refuse("mamba_num_heads", a.mamba_num_heads, f"must be a multiple of n_groups={a.n_groups}")
    if LayerType.moe not in a.layers:
        return
    if a.num_experts_per_tok > a.n_routed_experts:
        refuse(
            "num_experts_per_tok",
            a.num_experts_per_tok,
            f"must be at most n_routed_experts={a.n_routed_experts}",
        )
    if a.n_group < 1 or a.n_routed_experts % a.n_group or not 1 <= a.topk_group <= a.n_group:
        refuse(
            "n_group, topk_group",
            (a.n_group, a.topk_group),
            f"n_group must divide n_routed_experts={a.n_routed_experts}, topk_group be 1..n_group",
        )
    per_group = a.n_routed_experts // a.n_group
    if a.n_group > 1 and (per_group < 2 or a.topk_group * per_group < a.num_experts_per_tok):
        refuse(
            "n_group, topk_group",
            (a.n_group, a.topk_group),
            f"a group ({per_group} experts) needs two, and the chosen groups must hold "
            f"num_experts_per_tok={a.num_experts_per_tok} experts",
        )
