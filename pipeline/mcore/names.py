"""Where each tensor of a layer lives in its slot.

In: a slot's modules. Out: a table from the tensor's name within its layer ("mixer.in_proj.weight")
to the parameter, or the rows of it, that hold this rank's shard.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from pipeline.architecture import Architecture, LayerType
from pipeline.mcore.attention import Attention


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter or buffer of a module, or some of its first dim.

    Attributes:
        module: The owner.
        attribute: Name of the parameter or buffer.
        index: Rows of it, one entry of a stack, or None for all.
    """

    module: nn.Module
    attribute: str
    index: slice | int | None = None

    @property
    def whole(self) -> torch.Tensor:
        """The whole parameter or buffer."""
        tensor: torch.Tensor = getattr(self.module, self.attribute)
        return tensor

    @property
    def tensor(self) -> torch.Tensor:
        """A view of this place."""
        return self.whole if self.index is None else self.whole[self.index]


def places_of(
    architecture: Architecture, layer_type: LayerType, norm: nn.Module, mixer: nn.Module
) -> dict[str, Place]:
    """The table of one slot, without routed experts (see `expert_place`)."""
    table = {
        LayerType.mamba: _mamba,
        LayerType.attention: _attention,
        LayerType.moe: _moe,
        LayerType.mlp: _feed_forward,
    }[layer_type](architecture, mixer)
    return {"norm.weight": Place(norm, "weight")} | {
        f"mixer.{name}": place for name, place in table.items()
    }


def expert_place(name: str, experts: nn.Module, first_expert: int) -> Place:
    """Place of "mixer.experts.17.up_proj.weight" in the stacked experts."""
    _, _, index, projection, _ = name.split(".")
    return Place(experts, projection, int(index) - first_expert)


def _linear(name: str, module: nn.Module, bias: bool) -> dict[str, Place]:
    places = {f"{name}.weight": Place(module, "weight")}
    if bias:
        places[f"{name}.bias"] = Place(module, "bias")
    return places


def _mamba(a: Architecture, mamba: nn.Module) -> dict[str, Place]:
    places = {
        **_linear("in_proj", mamba.get_submodule("in_proj"), a.use_bias),
        **_linear("out_proj", mamba.get_submodule("out_proj"), a.use_bias),
        "conv1d.weight": Place(mamba, "conv1d_weight"),
        "norm.weight": Place(mamba.get_submodule("norm"), "weight"),
    }
    if a.use_conv_bias:
        places["conv1d.bias"] = Place(mamba, "conv1d_bias")
    return places | {name: Place(mamba, name) for name in ("A_log", "D", "dt_bias")}


def _attention(a: Architecture, attention: nn.Module) -> dict[str, Place]:
    assert isinstance(attention, Attention)
    qkv = attention.get_submodule("qkv_proj")
    places = _linear("o_proj", attention.get_submodule("o_proj"), a.attention_bias)
    start = 0
    for name, rows in zip("qkv", attention.rows, strict=True):
        part = slice(start, start + rows)
        places[f"{name}_proj.weight"] = Place(qkv, "weight", part)
        if a.attention_bias:
            places[f"{name}_proj.bias"] = Place(qkv, "bias", part)
        start += rows
    return places


def _moe(a: Architecture, moe: nn.Module) -> dict[str, Place]:
    router = moe.get_submodule("router")
    places = {
        "gate.weight": Place(router, "weight"),
        "gate.e_score_correction_bias": Place(router, "expert_bias"),
    }
    if a.moe_latent_size is not None:
        for name in ("fc1_latent_proj", "fc2_latent_proj"):
            places |= _linear(name, moe.get_submodule(name), a.mlp_bias)
    if a.has_shared_experts:
        shared = _feed_forward(a, moe.get_submodule("shared_experts"))
        places |= {f"shared_experts.{name}": place for name, place in shared.items()}
    return places


def _feed_forward(a: Architecture, network: nn.Module) -> dict[str, Place]:
    return {
        **_linear("up_proj", network.get_submodule("up_proj"), a.mlp_bias),
        **_linear("down_proj", network.get_submodule("down_proj"), a.mlp_bias),
    }
