"""The golden exported model as a server computes it, by our slots and by Model Optimizer's modules.

In: a directory that Model Optimizer exported, its weights (or others) dequantized. Out: logits of
the last positions, from input scales that the directory holds.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipeline.architecture import Architecture
from pipeline.mcore.backend import Groups
from pipeline.mcore.norms import normalize
from pipeline.mcore.slots import build_slots
from pipeline.nvfp4 import PackedWeight, dequantize_weight
from tests.unit.mcore.models import reader
from tests.unit.mcore.quantized_models import OurQuantizer, Scale, plain_input

GOLDEN = Path(__file__).parents[2] / "golden" / "modelopt_tiny"
RECIPES = {
    "four_over_six": "models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6",
    "nvfp4_default-kv_fp8": "general/ptq/nvfp4_default-kv_fp8",
}
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Golden:
    """What Model Optimizer exported under one recipe, and saw on an H100.

    `logits` are fake-quantized, `unquantized` those of the source; `amax` is by input quantizer.
    """

    name: str
    tensors: Tensors
    logits: torch.Tensor
    unquantized: torch.Tensor
    amax: dict[str, torch.Tensor]

    def weights(self) -> Tensors:
        """All tensors in fp32, quantized ones dequantized."""
        found = {}
        for name, tensor in self.tensors.items():
            if tensor.dtype is torch.uint8:
                scales = self.tensors[f"{name}_scale"], self.tensors[f"{name}_scale_2"]
                tensor = dequantize_weight(PackedWeight(tensor, *scales))
            elif is_fp8(name, tensor):
                tensor = tensor.float() * self.tensors[f"{name}_scale"]
            found[name] = tensor.float()
        return found

    def scales(self, layer: int) -> dict[str, Scale]:
        """Of a layer's projections; those that a server fuses have equal ones."""
        prefix, found = f"backbone.layers.{layer}.mixer.", {}
        for name, value in self.tensors.items():
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            if not name.startswith(prefix) or kind not in ("input_scale", "k_scale", "v_scale"):
                continue
            weight = self.tensors[f"{prefix}{module}.weight"]
            projection = module
            if kind != "input_scale":
                projection = f"{kind[0]}_cache"
            elif module.startswith("experts."):
                projection = f"experts.{module.rpartition('.')[2]}"
            elif module in ("q_proj", "k_proj", "v_proj"):
                projection = "qkv"
            nvfp4 = kind == "input_scale" and weight.dtype is torch.uint8
            scale = Scale("nvfp4" if nvfp4 else "fp8", value)
            assert found.setdefault(projection, scale).value == value, name
        return found


def read_golden(name: str) -> Golden:
    with np.load(GOLDEN / name / "modelopt.npz") as arrays:
        values = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    logits, unquantized = values.pop("quant_logits_last"), values.pop("ref_logits_last")
    amax = {key.removeprefix("input_amax/"): value for key, value in values.items()}
    return Golden(name, load_file(GOLDEN / name / "model.safetensors"), logits, unquantized, amax)


def is_fp8(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is an FP8 weight; block scales are E4M3 too."""
    return tensor.dtype is torch.float8_e4m3fn and name.endswith(".weight")


def read_ids() -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / "calibration_ids.npy")).long()


def read_source() -> Tensors:
    tensors = load_file(GOLDEN / "source" / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items()}


class _Partly(OurQuantizer):
    """Leaves inputs without a scale as they are."""

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        return super().quantize(projection, x) if projection in self.scales else x


def our_logits(weights: Tensors, scales: list[dict[str, Scale]], groups: Groups) -> torch.Tensor:
    """Last positions, with `scales[layer]` for the inputs of a layer."""
    config = json.loads((GOLDEN / "source" / "config.json").read_text(encoding="utf-8"))
    architecture, ids = Architecture.from_hf_config(config), read_ids()
    slots = build_slots(
        architecture,
        groups.dims,
        groups.rank,
        groups,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        seq_len=ids.shape[1],
    )
    hidden = F.embedding(ids, weights["backbone.embeddings.weight"]).transpose(0, 1).contiguous()
    for layer, layer_type in enumerate(architecture.layers):
        slots[layer_type].fill(layer, reader(weights))
        hidden = slots[layer_type].forward(hidden, None, _Partly(scales[layer]))
    final = normalize(hidden[-1], architecture.layer_norm_epsilon)
    return F.linear(final * weights["backbone.norm_f.weight"], weights["lm_head.weight"])


def model_optimizers_logits(golden: Golden, monkeypatch: Any) -> torch.Tensor:
    """Last positions, of Model Optimizer's quantizers around transformers' modules on the CPU.

    They hold the exported weights and the input amax that it found; its NVFP4 kernel, which needs a
    GPU, is the formula of the tests.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.torch.quantization import tensor_quant
    from transformers import NemotronHForCausalLM

    def quantize_blocks(x: torch.Tensor, block: int, amax: torch.Tensor, *_: Any) -> torch.Tensor:
        assert block == 16
        return plain_input(x, Scale("nvfp4", amax.float() * torch.tensor(1 / 2688)))

    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", quantize_blocks)
    model = NemotronHForCausalLM.from_pretrained(GOLDEN / "source", dtype=torch.float32).eval()
    ids = read_ids()
    recipe: Any = load_recipe(RECIPES[golden.name])
    entries = [entry.model_dump() for entry in recipe.quantize.quant_cfg]
    config = {"quant_cfg": entries, "algorithm": "max"}
    model = mtq.quantize(model, config, lambda quantized: quantized(ids[:1], use_cache=False))
    enabled = {}
    for name, module in model.named_modules():
        if "weight_quantizer" in name and hasattr(module, "disable"):
            module.disable()  # the exported weights are quantized already
        elif name.endswith("_quantizer") and module.is_enabled:
            enabled[name] = module
    assert set(enabled) == set(golden.amax)
    for name, module in enabled.items():
        module.amax = golden.amax[name]
    _fill(model, golden.weights())
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits[:, -1]
    return logits


def _fill(model: torch.nn.Module, weights: Tensors) -> None:
    """Copies the projections' weights, by NVIDIA's names, into transformers' model."""
    for name, parameter in model.named_parameters():
        stem = name.replace("model.", "backbone.", 1)
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            stem, _, projection = stem.rpartition(".")
            for expert, weight in enumerate(parameter.data):
                weight.copy_(weights[f"{stem}.{expert}.{projection}.weight"])
        elif "_proj." in name:
            parameter.data.copy_(weights[stem])
