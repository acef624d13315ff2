"""The demo checkpoint on disk: NVIDIA's config.json vocabulary and tensor names, BF16.

Goes in: a training model. Comes out: `config.json`, `generation_config.json` and
`model.safetensors`, as NVIDIA publishes a Nemotron-H (one tensor per expert,
`hybrid_override_pattern`, gate in FP32); and back.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.demo.layers import DemoConfig
from pipeline.demo.model import DemoModel

MAX_POSITION_EMBEDDINGS = 4096
# NVIDIA's checkpoints keep the router in FP32; all other tensors are BF16.
FP32_SUFFIXES = ("gate.weight", "gate.e_score_correction_bias")


def hf_config(config: DemoConfig) -> dict[str, Any]:
    """The whole config.json, in the vocabulary of NVIDIA's published checkpoints."""
    return asdict(config) | {
        "architectures": ["NemotronHForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "expand": config.mamba_intermediate_size // config.hidden_size,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "intermediate_size": config.moe_intermediate_size,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h",
        "moe_shared_expert_overlap": False,
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_hidden_layers": len(config.hybrid_override_pattern),
        "num_logits_to_keep": 1,
        "num_nextn_predict_layers": 1,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        # transformers clamps dt from below by time_step_min, other implementations do not clamp;
        # a bound that no trained dt reaches makes them agree.
        "time_step_limit": [0.0, float("inf")],
        "time_step_max": 0.1,
        "time_step_min": 1e-6,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
    }


def save_checkpoint(model: DemoModel, directory: Path) -> None:
    """Write config, generation config and weights; weights are rounded to BF16 (router: FP32)."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", hf_config(model.config))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    _write_json(directory / "generation_config.json", generation)
    tensors = {
        name: tensor.to(torch.float32 if name.endswith(FP32_SUFFIXES) else torch.bfloat16)
        for name, tensor in _split_experts(model.state_dict()).items()
    }
    weights = directory / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files that only their owner may read


def load_model(directory: Path, scan_chunk: int = 32) -> DemoModel:
    """The model of a demo checkpoint directory, in fp32."""
    written = json.loads((directory / "config.json").read_text())
    config = DemoConfig(**{field.name: written[field.name] for field in fields(DemoConfig)})
    model = DemoModel(config, scan_chunk)
    stored = load_file(directory / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in _stack_experts(stored).items()})
    return model.eval()


def _split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`...experts.up_proj` [E, F, L] to one `...experts.{e}.up_proj.weight` [F, L] per expert."""
    split = {}
    for name, tensor in state.items():
        if ".experts." in name:
            prefix, projection = name.rsplit(".", 1)
            for expert, matrix in enumerate(tensor):
                split[f"{prefix}.{expert}.{projection}.weight"] = matrix.contiguous()
        else:
            split[name] = tensor.contiguous()
    return split


def _stack_experts(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_split_experts`."""
    stacked, parts = {}, dict[str, dict[int, Tensor]]()
    for name, tensor in stored.items():
        if ".experts." in name:
            prefix, expert, projection, _ = name.rsplit(".", 3)
            parts.setdefault(f"{prefix}.{projection}", {})[int(expert)] = tensor
        else:
            stacked[name] = tensor
    for name, experts in parts.items():
        stacked[name] = torch.stack([experts[index] for index in range(len(experts))])
    return stacked


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
