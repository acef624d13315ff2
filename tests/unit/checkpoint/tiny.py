"""A tiny checkpoint: 12 layers of all four kinds, MTP, and its mixed or flat export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture, TensorSpec, expected_tensors, mtp_tensors
from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.publish import WorkDirectory, finalize, prepare, publish
from pipeline.checkpoint.quantization_config import (
    build_quantization_configs,
    unquantized_modules,
)
from pipeline.checkpoint.safetensors_file import read_header
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.writer import FileRecord, Writable, write_safetensors
from pipeline.errors import AuditError
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.nvfp4.reference import quantize_fp8, quantize_nvfp4, tensor_amax

Formats = dict[str, tuple[Format, Format | None]]

NVFP4 = (Format.nvfp4, Format.nvfp4)
W4A16 = (Format.nvfp4, None)
FP8 = (Format.fp8, Format.fp8)


def tiny_config(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MEM*EM-MEM*E",
        "num_hidden_layers": 12,
        "hidden_size": 64,
        "vocab_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "mamba_num_heads": 2,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "conv_kernel": 4,
        "n_routed_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "moe_latent_size": 64,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 64,
        "intermediate_size": 64,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
        "tie_word_embeddings": False,
    }
    return config | changes


def tiny_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    architecture = Architecture.from_hf_config(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for spec in [*expected_tensors(architecture), *mtp_tensors(architecture)]:
        dtype = torch.float32 if spec.keeps_source_dtype else torch.bfloat16
        tensors[spec.name] = torch.randn(spec.shape, generator=generator).mul(0.02).to(dtype)
    return tensors


def write_source(
    directory: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    index: bool = True,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "nested").mkdir(exist_ok=True)
    (directory / "nested" / "modeling.py").write_text("# remote code\n")
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        write_safetensors(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory


def mixed_formats(architecture: Architecture) -> Formats:
    formats: Formats = {}
    for spec in expected_tensors(architecture):
        if spec.is_linear_weight:
            if spec.is_routed_expert or spec.role.value == "attention_qkv":
                formats[spec.module] = NVFP4
            elif spec.role.value in ("shared_expert", "mamba_in", "mamba_out"):
                formats[spec.module] = FP8
    return formats


def export(source: Source, final: Path, formats: Formats, *, kv_cache_fp8: bool = True) -> Path:
    """Quantizes and publishes as a run does, two files per checkpoint."""
    architecture = Architecture.from_hf_config(source.config)
    specs = expected_tensors(architecture)
    work = WorkDirectory.beside(final)
    prepare(work)
    amax = _amax_of(source, specs)
    out: list[dict[str, Writable]] = [{}, {}]
    for spec in specs:
        half = out[0 if (spec.layer or 0) < 6 else 1]
        if spec.is_linear_weight and spec.module in formats:
            half |= _packed(source.read(spec.name), spec, formats[spec.module], amax)
        else:
            half[spec.name] = source.tensors[spec.name]
        if kv_cache_fp8 and spec.module.endswith(("k_proj", "v_proj")):
            letter = spec.module[-6]
            half[f"{spec.module}.{letter}_scale"] = torch.tensor(1.0)
    out[1] |= {name: info for name, info in source.tensors.items() if name.startswith("mtp.")}
    records: list[FileRecord] = [
        write_safetensors(work.files / f"part-{number}.safetensors", tensors)
        for number, tensors in enumerate(out)
    ]
    configs = build_quantization_configs(
        formats, unquantized_modules(architecture, formats), kv_cache_fp8=kv_cache_fp8
    )
    publish(
        work,
        records,
        config=source.config | {"quantization_config": configs.quantization_config},
        hf_quant_config=configs.hf_quant_config,
        small_files=source.small_files,
    )
    return finalize(work)


def rewrite(directory: Path, change: Any, *, file: int = 0, fix_index: bool = True) -> None:
    """Loads one shard as a dict, lets `change` edit it in place, and writes it back."""
    path = sorted(directory.glob("*.safetensors"))[file]
    tensors = load(path)
    change(tensors)
    write_safetensors(path, tensors)
    if fix_index:
        reindex(directory)


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def reindex(directory: Path) -> None:
    weight_map, total = {}, 0
    for path in sorted(directory.glob("*.safetensors")):
        for info in read_header(path).values():
            weight_map[info.name] = path.name
            total += info.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_configs(directory: Path, change: Any) -> None:
    """Applies `change(quantized_layers or None, ignore list)` to both configs alike."""

    def in_config(value: dict[str, Any]) -> None:
        inner = value["quantization_config"]
        change(inner.get("quantized_layers"), inner["ignore"])
        if "quantized_layers" in inner:
            for group in inner["config_groups"].values():
                group["targets"] = [t for t in group["targets"] if t in inner["quantized_layers"]]

    def in_hf(value: dict[str, Any]) -> None:
        inner = value["quantization"]
        change(inner.get("quantized_layers"), inner["exclude_modules"])

    edit_json(directory / "config.json", in_config)
    edit_json(directory / "hf_quant_config.json", in_hf)


def expect_problems(directory: Path, *messages: str, **options: Any) -> None:
    """The audit finds each message, and raises."""
    result = audit(directory, **options)
    for message in messages:
        assert any(message in problem for problem in result.problems), result.problems
    with pytest.raises(AuditError) as caught:
        result.raise_if_failed()
    assert messages[0] in str(caught.value)


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def _amax_of(source: Source, specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensor amax per module; q/k/v share the largest of the three."""
    amax = {
        spec.module: tensor_amax(source.read(spec.name)) for spec in specs if spec.is_linear_weight
    }
    for module in [module for module in amax if module.endswith("q_proj")]:
        group = [module.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        shared = torch.stack([amax[name] for name in group]).max()
        amax |= dict.fromkeys(group, shared)
    return amax


def _packed(
    weight: torch.Tensor,
    spec: TensorSpec,
    pair: tuple[Format, Format | None],
    amax: dict[str, torch.Tensor],
) -> dict[str, Writable]:
    tensors: dict[str, Writable]
    if pair[0] is Format.nvfp4:
        packed = quantize_nvfp4(weight, amax[spec.module], WeightMethod.four_over_six)
        tensors = {
            spec.name: packed.codes,
            f"{spec.name}_scale": packed.weight_scale,
            f"{spec.name}_scale_2": packed.weight_scale_2,
        }
    else:
        codes, scale = quantize_fp8(weight, amax[spec.module])
        tensors = {spec.name: codes, f"{spec.name}_scale": scale}
    if pair[1] is not None:
        tensors[f"{spec.module}.input_scale"] = torch.tensor(0.01)
    return tensors
