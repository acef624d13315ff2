"""Tiny random nemotron_h checkpoints on disk, in NVIDIA's naming, of any variant.

source = write_checkpoint(tmp_path / "source", tie_word_embeddings=True)
source = write_checkpoint(tmp_path / "source", Files(shards=3, index=False), use_bias=True)
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipeline.architecture import Architecture, expected_tensors, mtp_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
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
    "chunk_size": 64,  # transformers' scan is exact only with one chunk
    "time_step_min": 1e-9,  # transformers clamps dt here, and takes the logarithm
    "time_step_limit": [0.0, math.inf],  # json.dumps writes Infinity, as NVIDIA's files have it
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
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
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "hybrid_override_pattern": "ME*-ME",
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
}
EMBEDDING = "backbone.embeddings.weight"
SMALL_FILES = {
    "generation_config.json": '{"eos_token_id": 2}\n',
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
    "modeling_nemotron_h.py": "# remote code\n",
    "LICENSE": "terms\n",
    "assets/figure.txt": "a file in a folder\n",
}


@dataclasses.dataclass(frozen=True)
class Files:
    """How a checkpoint lies on disk.

    Attributes:
        shards: Number of files; one is `model.safetensors`.
        index: Whether an index goes with several files.
        dtype: Of everything but the router and the parameters of the state-space scan.
        embedding: Name of the embedding.
        in_hub_cache: Lay it out as the Hub's cache does: links into `blobs`.
    """

    shards: int = 1
    index: bool = True
    dtype: torch.dtype = torch.bfloat16
    embedding: str = EMBEDDING
    in_hub_cache: bool = False


def write_checkpoint(directory: Path, files: Files | None = None, **settings: Any) -> Path:
    """Writes a checkpoint of `CONFIG` with other `settings` (None removes one); its directory."""
    files = files or Files()
    config = {key: value for key, value in (CONFIG | settings).items() if value is not None}
    tensors = random_tensors(config, files)
    if files.in_hub_cache:
        return _write_as_hub_cache(directory, config, tensors, files)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    write_tensors(directory, tensors, files)
    for name, text in SMALL_FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


def random_tensors(config: Mapping[str, Any], files: Files) -> dict[str, torch.Tensor]:
    """Every tensor that `config` describes, with values of realistic scale."""
    architecture = Architecture.from_hf_config(config)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for spec in [*expected_tensors(architecture), *mtp_tensors(architecture)]:
        name = files.embedding if spec.name == EMBEDDING else spec.name
        value = _random_value(spec.name, spec.shape, generator)
        tensors[name] = value if spec.keeps_source_dtype else value.to(files.dtype)
    return tensors


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], files: Files) -> None:
    """Writes the weight files, and the index where one is asked for."""
    if files.shards == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return
    weight_map = {}
    for shard in range(files.shards):
        name = f"model-{shard + 1:05d}-of-{files.shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[shard :: files.shards]}
        save_file(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    if files.index:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a single-file checkpoint; '__' stands for '.'."""
    tensors = load_file(directory / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **settings: Any) -> None:
    """Changes config.json; None removes a setting."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | settings
    config = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(config))


def write_token_ids(path: Path, sequences: int, seq_len: int, vocab_size: int = 96) -> Path:
    """A .npy file of random token ids."""
    ids = np.random.default_rng(5).integers(0, vocab_size, (sequences, seq_len))
    np.save(path, ids)
    return path


def digest_directory(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _write_as_hub_cache(
    cache: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], files: Files
) -> Path:
    """Lays out `models--made--tiny` below `cache`; returns the snapshot."""
    home = cache / "models--made--tiny"
    plain = cache / "plain"
    plain.mkdir(parents=True)
    (plain / "config.json").write_text(json.dumps(config))
    write_tensors(plain, tensors, files)
    for name, text in SMALL_FILES.items():
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_text(text)
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = home / "snapshots" / revision
    for path in sorted(plain.rglob("*")):
        if path.is_file():
            relative = path.relative_to(plain)
            blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            link = snapshot / relative
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            path.rename(blob)
            up = "../" * (2 + len(relative.parts) - 1)
            link.symlink_to(f"{up}blobs/{blob.name}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return snapshot


def _random_value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """fp32 values that keep activations near 1."""
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return (1.0 + 7.0 * uniform).log()
    if name.endswith("dt_bias"):
        return 3.5 * uniform - 3.0
    if name.endswith("e_score_correction_bias"):
        return 0.2 * normal
    if name.endswith(("norm.weight", "norm_f.weight", "layernorm.weight", ".D")):
        return 1.0 + 0.2 * normal
    if name.endswith("bias"):
        return 0.3 * normal
    if name == EMBEDDING:
        return normal
    if "conv1d" in name:
        return 0.5 * normal
    return normal * (1.5 / shape[-1] ** 0.5)
