"""transformers' model as a server with quantized weights and inputs computes it.

Weights go through Model Optimizer's NVFP4 tensor, inputs through formulas written here: nothing of
`pipeline.nvfp4` is used, except in `OurQuantizer`, which is what is to agree with them.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.nvfp4.activations import fp8_input, nvfp4_input
from tests.unit.mcore.models import Reference, make_reference

# By projection: each format at every place in some layer type, and some left as they are.
FORMATS = {
    "in_proj": "fp8",
    "out_proj": "nvfp4",
    "qkv": "nvfp4",
    "o_proj": "fp8",
    "k_cache": "fp8",
    "v_cache": "fp8",
    "fc1_latent_proj": "nvfp4",
    "fc2_latent_proj": "fp8",
    "shared_experts.up_proj": "nvfp4",
    "shared_experts.down_proj": "fp8",
    "experts.up_proj": "nvfp4",
    "experts.down_proj": "nvfp4",
    "up_proj": "fp8",
    "down_proj": "nvfp4",
}
# Even codes first: argmin takes the first of two that are equally near.
_E2M1 = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0])


@dataclasses.dataclass(frozen=True)
class Scale:
    """How one projection's inputs are quantized."""

    format: str
    value: torch.Tensor


def scales_from(amax: dict[str, float], *, clipped: float = 0.8) -> dict[str, Scale]:
    """Scales for so much of each amax: what lies beyond saturates."""
    largest = {"nvfp4": 6 * 448, "fp8": 448}
    scales = {}
    for name, value in amax.items():  # transformers gives a model without shared experts zeros
        scale = max(value * clipped, 1e-6) / largest[FORMATS[name]]
        scales[name] = Scale(FORMATS[name], torch.tensor(scale))
    return scales


def plain_input(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """What a server makes of an fp32 input."""
    if scale.format == "fp8":
        codes = (x / scale.value).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.float() * scale.value
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    amax = blocks.abs().amax(-1, keepdim=True)
    e4m3 = (amax / (6 * scale.value)).clamp(max=448).to(torch.float8_e4m3fn).float()
    block_scale = torch.where(e4m3 > 0, e4m3 * scale.value, torch.inf)
    rounded = round_e2m1(blocks.abs() / block_scale)
    return (rounded * blocks.sign() * (e4m3 * scale.value)).view(x.shape)


def round_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 values, fp32, that of the even code on a tie."""
    distance = (magnitude.unsqueeze(-1).double() - _E2M1).abs()
    return _E2M1[distance.argmin(-1)]


def served_reference(variant: str, scales: dict[str, Scale]) -> Reference:
    """The model with every projection quantized: its tensors are the dequantized weights."""

    def prepare(model: torch.nn.Module) -> None:
        for path, module in model.named_modules():
            _serve(path.partition(".mixer.")[2], module, scales)

    return make_reference(variant, prepare=prepare)


class OurQuantizer:
    """The quantizer under test, made of `pipeline.nvfp4.activations`."""

    def __init__(self, scales: dict[str, Scale]) -> None:
        self.scales = scales

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        scale = self.scales[projection]
        if scale.format == "fp8":
            return fp8_input(x, scale.value, "reference")
        return nvfp4_input(x, scale.value, "reference")


def _serve(name: str, module: torch.nn.Module, scales: dict[str, Scale]) -> None:
    """Quantizes the weights of a projection, and has it quantize its inputs."""
    projection = "qkv" if name in ("q_proj", "k_proj", "v_proj") else name
    if name == "experts":
        _serve_experts(module, scales)
    elif projection in scales and isinstance(module, torch.nn.Linear):
        scale = scales[projection]
        module.weight.data.copy_(_through_storage(module.weight.data, scale.format))
        module.register_forward_pre_hook(lambda _, args: (plain_input(args[0], scale),))
        if name in ("k_proj", "v_proj"):
            cached = scales[f"{name[0]}_cache"]
            module.register_forward_hook(lambda _, __, output: plain_input(output, cached))


def _serve_experts(module: Any, scales: dict[str, Scale]) -> None:
    up, down = scales["experts.up_proj"], scales["experts.down_proj"]
    for weights in (module.up_proj.data, module.down_proj.data):
        for weight in weights:
            weight.copy_(_through_storage(weight, "nvfp4"))

    def forward(
        tokens: torch.Tensor, chosen_TK: torch.Tensor, probs_TK: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(tokens)
        quantized = plain_input(tokens, up)
        for token, row in enumerate(quantized):
            for expert, prob in zip(chosen_TK[token], probs_TK[token], strict=True):
                inner = F.linear(row, module.up_proj[expert]).relu().square()
                inner = plain_input(inner, down)
                output[token] += prob * F.linear(inner, module.down_proj[expert])
        return output

    module.forward = forward


def _through_storage(weight: torch.Tensor, weight_format: str) -> torch.Tensor:
    """The fp32 weights that a checkpoint would hold."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    if not weight.any():  # in place of shared experts that a model does not have
        return weight
    if weight_format == "fp8":
        scale = weight.abs().max() / 448
        return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    stored, scale, double_scale = NVFP4QTensor.quantize(weight.clone(), 16)
    return stored.dequantize(
        dtype=torch.float32, scale=scale, double_scale=double_scale, block_sizes={-1: 16}
    )
