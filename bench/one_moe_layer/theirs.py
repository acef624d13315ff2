"""Model Optimizer's side: its Hugging Face path on a transformers model of one layer.

In: the layer, a recipe of Model Optimizer's library, micro-batches. Out: figures, and the exported
directory. Its functions are its own and are called as its examples call them; what is timed inside
them (weight search, packing) is timed by wrappers put around them here.

What is arranged in its favour: the layer is called alone (no embedding, mask or head in the timed
loop), and its CUDA extensions and kernels are compiled beforehand.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .layer import SHAPES, Layer
from .timing import Figures, measure_batches

PLAIN_BATCH = 4
"""Largest micro-batch without quantizers: more is not faster, and fills the memory."""


def run(
    layer: Layer,
    figures: Figures,
    directory: Path,
    *,
    recipe: str,
    batches: list[int],
    tokens: int,
    limit_s: float,
) -> None:
    """Measures everything; `figures` keeps what was found, also where a later step fails.

    Args:
        layer: What to calibrate and export.
        figures: Where results go.
        directory: Where the export goes.
        recipe: Name in Model Optimizer's library.
        batches: Sequences per forward call, each measured.
        tokens: Calibration tokens of each measurement, a multiple of the sequence length.
        limit_s: Seconds after which a measurement ends early.
    """
    if layer.device.type == "cuda":
        with figures.timed("compile_extensions_s"):
            _compile_extensions()
    with figures.timed("rehearsal_s"), torch.no_grad():
        _rehearse(layer, directory.with_name("rehearsal"), recipe)
    _instrument(figures)
    sequences = layer.sequences(tokens // layer.shape.seq_len)
    with figures.timed("build_s"):
        model = build(layer)
    block = model.model.layers[0]

    def forward_of(batch: int) -> Callable[[int], object]:
        starts = range(0, len(sequences) - batch + 1, batch)
        return lambda call: _forward(block, sequences[starts[call] : starts[call] + batch])

    def measure(name: str, chosen: list[int]) -> None:
        _forward(block, sequences[:1])  # warm
        measure_batches(
            figures,
            name,
            forward_of,
            chosen,
            seq_len=layer.shape.seq_len,
            tokens=tokens,
            limit_s=limit_s,
        )

    usable = sorted((batch for batch in batches if batch <= len(sequences)), reverse=True)
    with torch.no_grad():
        measure("plain_forward", [batch for batch in usable if batch <= PLAIN_BATCH])
        kinds = [model.config._experts_implementation]
        # The largest batch first: whatever the limit, every sequence has then been seen.
        with figures.timed("quantize_s"):
            _quantize(model, recipe, lambda _: measure("calibrate", usable))
        kinds.append(model.config._experts_implementation)
        figures.set("experts_implementation_before_and_after_quantize", kinds)
        figures.reset_peak()
        with figures.timed("export_s"):
            _export(model, directory)
        figures.set("export_peak_gib", figures.peak_gib())
    figures.set("write_s", figures.values["export_s"] - figures.values["pack_s"])
    text = (directory / "hf_quant_config.json").read_text(encoding="utf-8")
    if "pt_name_sentinel" in text or "\\u0000" in text:
        figures.note("quantized_layers of hf_quant_config.json holds broken module names (NUL)")


def build(layer: Layer) -> Any:
    """A transformers NemotronH model of this layer alone, bf16, holding the layer's weights."""
    import transformers

    config = transformers.NemotronHConfig(**layer.config)
    with torch.device("meta"):
        model = transformers.NemotronHForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=layer.device).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() < 3:
            parameter.normal_(0, 0.02)  # embedding, head and last norm: nothing measures them
    model.model.layers[0].mixer.gate.float()  # its forward pass multiplies in FP32
    for spec in layer.tensors:
        target(model, spec.name).copy_(layer.weight(spec))
    return model


def target(model: Any, name: str) -> torch.Tensor:
    """The tensor of the model that a checkpoint's name means; routed experts are stacked there."""
    owner, _, attribute = name.replace("backbone.", "model.", 1).rpartition(".")
    if ".experts." not in owner or "shared_experts" in owner:
        tensor: torch.Tensor = getattr(model.get_submodule(owner), attribute)
        return tensor
    experts, expert, projection = owner.rsplit(".", 2)
    stack: torch.Tensor = getattr(model.get_submodule(experts), projection)
    return stack[int(expert)]


def _compile_extensions() -> None:
    from modelopt.torch.quantization.extensions import precompile

    precompile()


def _forward(block: Any, sequences: list[torch.Tensor]) -> None:
    block(torch.stack(sequences))


def _rehearse(layer: Layer, directory: Path, recipe: str) -> None:
    """The whole path once on a tiny layer: imports, kernels compiled at first use."""
    tiny = dataclasses.replace(layer, shape=SHAPES["small"])
    model = build(tiny)
    _quantize(model, recipe, lambda _: _forward(model.model.layers[0], tiny.sequences(1)))
    _export(model, directory)
    shutil.rmtree(directory)


def _instrument(figures: Figures) -> None:
    """Puts a clock around the parts that are told apart."""
    from modelopt.torch.export import unified_export_hf
    from modelopt.torch.quantization import model_calib

    for module, function, name in (
        (model_calib, "weight_only_quantize", "choose_weight_scales_s"),  # amax of every weight
        (model_calib, "_mse_calibrate_weights", "choose_weight_scales_s"),  # then the search
        (unified_export_hf, "_export_transformers_checkpoint", "pack_s"),
    ):
        setattr(module, function, figures.timing(name, getattr(module, function)))


def _quantize(model: Any, recipe: str, forward_loop: Callable[[Any], None]) -> None:
    """`mtq.quantize` with the recipe's own configuration."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe

    quantize = load_recipe(recipe).quantize
    configuration = {"quant_cfg": quantize.quant_cfg, "algorithm": quantize.algorithm}
    mtq.quantize(model, configuration, forward_loop)


def _export(model: Any, directory: Path) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(model, export_dir=directory)
