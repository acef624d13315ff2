"""Tiny Nemotron-H models: transformers' own, and a reader of shards of its weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.architecture import Architecture, LayerType, TensorSpec, expected_tensors
from pipeline.mcore.backend import Groups
from pipeline.mcore.norms import normalize
from pipeline.mcore.slots import Slot, build_slots
from pipeline.sharding import Shard

SEQ_LEN = 24
BATCH = 2

BASE: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 4,
    "conv_kernel": 4,
    "chunk_size": 32,  # transformers is exact only with one chunk
    "time_step_min": 1e-9,  # transformers clamps dt here, and takes the logarithm
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "intermediate_size": 64,
    "layer_norm_epsilon": 1e-5,
    "hybrid_override_pattern": "ME*-ME",
}

VARIANTS: dict[str, dict[str, Any]] = {
    "all_kinds": {},
    "mamba": {"hybrid_override_pattern": "MM", "layer_norm_epsilon": 1e-3},
    "mamba_biases": {"hybrid_override_pattern": "MM", "use_bias": True, "use_conv_bias": False},
    "attention": {"hybrid_override_pattern": "**"},
    "attention_biases": {"hybrid_override_pattern": "**", "attention_bias": True},
    "mlp_biases": {"hybrid_override_pattern": "--", "mlp_bias": True},
    "moe": {"hybrid_override_pattern": "EE", "moe_latent_size": None},
    "moe_biases": {"hybrid_override_pattern": "EE", "mlp_bias": True},
    "moe_without_shared": {
        "hybrid_override_pattern": "EE",
        "n_shared_experts": 0,
        "moe_shared_expert_intermediate_size": 0,
    },
    "moe_top1": {
        "hybrid_override_pattern": "EE",
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
    # Every bias, groups, no latents, other counts of heads.
    "wide": {
        "hybrid_override_pattern": "E*M-E",
        "use_bias": True,
        "mlp_bias": True,
        "attention_bias": True,
        "moe_latent_size": None,
        "n_group": 2,
        "topk_group": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "routed_scaling_factor": 1.0,
    },
    "moe_groups": {"hybrid_override_pattern": "EE", "n_group": 4, "topk_group": 3},
}


@dataclasses.dataclass
class Reference:
    """A model, its tensors by checkpoint name, and what transformers makes of `ids`.

    `amax` holds the largest input of each projection, over all layers of the type.
    """

    architecture: Architecture
    tensors: dict[str, torch.Tensor]
    ids: torch.Tensor
    logits: torch.Tensor
    amax: dict[str, float]


def make_reference(
    variant: str, seed: int = 1, prepare: Callable[[torch.nn.Module], None] | None = None
) -> Reference:
    """Builds transformers' model with random weights of realistic scale and runs it in fp32.

    `prepare` may change the weights, and how modules compute, before the model runs.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = BASE | VARIANTS[variant]
    without_shared = config.get("n_shared_experts") == 0
    hf_config = dict(config)
    if without_shared:  # transformers always builds one: an all-zero one adds nothing
        hf_config["moe_shared_expert_intermediate_size"] = 16
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(NemotronHConfig(**hf_config)).float().eval()
    if config["attention_bias"]:  # transformers ignores the setting
        for module in model.modules():
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                if hasattr(module, name):
                    getattr(module, name).bias = torch.nn.Parameter(
                        torch.empty(getattr(module, name).out_features)
                    )
    state = model.state_dict()
    for name, tensor in state.items():
        _randomize(name, tensor)
        if without_shared and "shared_experts" in name:
            tensor.zero_()
    ids = torch.randint(0, config["vocab_size"], (BATCH, SEQ_LEN))
    if prepare is not None:
        prepare(model)
    amax = _watch_amax(model)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    architecture = Architecture.from_hf_config(config)
    tensors = checkpoint_tensors(state)
    wanted = {spec.name: tuple(spec.shape) for spec in expected_tensors(architecture)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in wanted}
    assert found == wanted
    return Reference(architecture, tensors, ids, logits, amax)


def checkpoint_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names to NVIDIA's; the fused experts one by one."""
    tensors = {}
    for name, tensor in state.items():
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        name = name.replace("backbone.embedding.", "backbone.embeddings.")
        name = name.replace("backbone.final_layernorm.", "backbone.norm_f.")
        if name.endswith(("mixer.experts.up_proj", "mixer.experts.down_proj")):
            stem, _, projection = name.rpartition(".")
            for expert, weight in enumerate(tensor):
                tensors[f"{stem}.{expert}.{projection}.weight"] = weight.clone()
        else:
            tensors[name] = tensor.clone()
    return tensors


def reader(tensors: Mapping[str, torch.Tensor]) -> Callable[[TensorSpec, Shard], torch.Tensor]:
    """The `read` of `Slot.fill`, over whole tensors in memory."""

    def read(spec: TensorSpec, shard: Shard) -> torch.Tensor:
        tensor = tensors[spec.name]
        if shard.is_whole:
            return tensor
        parts = [tensor.narrow(shard.dim, start, stop - start) for start, stop in shard.ranges]
        return torch.cat(parts, dim=shard.dim)

    return read


def make_slots(
    reference: Reference, groups: Groups, *, dtype: torch.dtype = torch.float32
) -> dict[LayerType, Slot]:
    return build_slots(
        reference.architecture,
        groups.dims,
        groups.rank,
        groups,
        device=torch.device("cpu"),
        compute_dtype=dtype,
        seq_len=SEQ_LEN,
    )


def run_layers(
    reference: Reference,
    groups: Groups,
    slots: dict[LayerType, Slot],
    tap: Any = None,
    quantizer: Any = None,
) -> torch.Tensor:
    """This rank's part of the final hidden states: [seq/tp, its sequences, hidden]."""
    dims, at = groups.dims, groups.at
    ids = reference.ids.chunk(dims.dp)[at.dp_rank]
    hidden = F.embedding(ids, reference.tensors["backbone.embeddings.weight"])
    hidden = hidden.transpose(0, 1).chunk(dims.tp)[at.tp_rank].contiguous()
    for layer, layer_type in enumerate(reference.architecture.layers):
        slots[layer_type].fill(layer, reader(reference.tensors))
        hidden = slots[layer_type].forward(hidden, tap, quantizer)
    return hidden


def logits_of(reference: Reference, hidden: torch.Tensor) -> torch.Tensor:
    """[seq, batch, hidden] to [batch, seq, vocab]."""
    final = normalize(hidden, reference.architecture.layer_norm_epsilon)
    final = final * reference.tensors["backbone.norm_f.weight"]
    return F.linear(final, reference.tensors["lm_head.weight"]).transpose(0, 1)


def expected_logits(reference: Reference, groups: Groups) -> torch.Tensor:
    """The part of transformers' logits that `logits_of(run_layers(...))` should give."""
    sequences = reference.logits.chunk(groups.dims.dp)[groups.at.dp_rank]
    return sequences.chunk(groups.dims.tp, dim=1)[groups.at.tp_rank]


class RecordingTap:
    """Keeps the amax of what it sees, by both ways of reporting, and counts tokens per expert.

    `seen` holds what came as whole tensors; what a kernel reports only raises an amax.
    """

    def __init__(self, experts: int, device: torch.device | None = None) -> None:
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.tokens_per_expert = torch.zeros(experts, dtype=torch.int64)
        self.tokens = 0
        self._raised: dict[str, torch.Tensor] = {}
        self._device = device

    @property
    def amax(self) -> dict[str, float]:
        """By projection; without those that nothing was seen of."""
        amax = {name: values.item() for name, values in self._raised.items()}
        for name, tensors in self.seen.items():
            amax[name] = max([amax.get(name, 0.0), *(x.abs().amax().item() for x in tensors)])
        return amax

    def activation(self, projection: str, x: torch.Tensor) -> None:
        self.seen.setdefault(projection, []).append(x.clone())

    def amax_of(self, projection: str) -> torch.Tensor:
        return self._raised.setdefault(projection, torch.zeros(1, device=self._device))

    def routing(self, chosen_TK: torch.Tensor) -> None:
        assert not chosen_TK.is_floating_point()
        assert all(len(set(chosen_K)) == len(chosen_K) for chosen_K in chosen_TK.tolist())
        experts = self.tokens_per_expert.shape[0]
        self.tokens += chosen_TK.shape[0]
        self.tokens_per_expert += chosen_TK.flatten().long().cpu().bincount(minlength=experts)


def _watch_amax(model: torch.nn.Module) -> dict[str, float]:
    """Fills the dict that it returns whenever `model` runs; names as in `Tap.activation`."""
    amax: dict[str, float] = {}

    def see(name: str, x: torch.Tensor) -> None:
        amax[name] = max(amax.get(name, 0.0), x.abs().amax().item())

    def see_experts(experts: Any, args: tuple[torch.Tensor, ...]) -> None:
        tokens, chosen_TK, _ = args
        see("experts.up_proj", tokens)
        for token, chosen_K in zip(tokens, chosen_TK, strict=True):
            for expert in chosen_K:
                see("experts.down_proj", F.linear(token, experts.up_proj[expert]).relu().square())

    for path, module in model.named_modules():
        name = path.partition(".mixer.")[2]
        if name.endswith(("q_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj")) or (
            name.endswith("latent_proj") and isinstance(module, torch.nn.Linear)
        ):
            name = "qkv" if name == "q_proj" else name
            module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        elif name in ("k_proj", "v_proj"):
            name = f"{name[0]}_cache"
            module.register_forward_hook(lambda _, __, output, name=name: see(name, output))
        elif name == "experts":
            module.register_forward_pre_hook(see_experts)
    return amax


def _randomize(name: str, tensor: torch.Tensor) -> None:
    if name.endswith("A_log"):
        tensor.copy_(torch.empty_like(tensor).uniform_(1.0, 8.0).log())
    elif name.endswith("dt_bias"):
        tensor.uniform_(-3.0, 0.5)
    elif name.endswith("e_score_correction_bias"):
        tensor.normal_(0.0, 0.2)
    elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
        tensor.normal_(1.0, 0.2)
    elif name.endswith("bias"):
        tensor.normal_(0.0, 0.3)
    elif "embeddings" in name:
        tensor.normal_(0.0, 1.0)
    elif "conv1d" in name:
        tensor.normal_(0.0, 0.5)
    else:
        tensor.normal_(0.0, 1.5 / tensor.shape[-1] ** 0.5)
