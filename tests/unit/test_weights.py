"""Weights from a slot and weights from buffers give packing the same matrices."""

import pytest
import torch

from pipeline.architecture import Role, TensorSpec
from pipeline.sharding import Shard
from pipeline.weights import Buffers, SlotWeights, take

CPU = torch.device("cpu")
PREFIX = "backbone.layers.5.mixer"


class FakeSlot:
    """Three local experts, from expert 6 on, and one dense weight."""

    def __init__(self) -> None:
        self.stack = torch.arange(3 * 2 * 4.0).view(3, 2, 4)

    def weight(self, name: str) -> torch.Tensor:
        return {f"{PREFIX}.in_proj.weight": torch.ones(2, 2)}[name]

    def experts(self, projection: str) -> tuple[torch.Tensor, int]:
        return (self.stack if projection == "up_proj" else self.stack.mT), 6


def fill(buffers: Buffers, layer: int, tensors: dict[str, torch.Tensor]) -> Buffers:
    """Loads tensors by name, in the order given backwards: any order will do."""
    coming = []
    for name, tensor in tensors.items():
        role = Role.routed_expert if ".experts." in name else Role.mamba_in
        shape = tuple(tensor.shape)
        coming.append((TensorSpec(name, shape, role, layer), Shard(-1, (), shape)))
    buffers.expect(coming)
    buffers.begin_fill(layer)
    for spec, shard in reversed(coming):
        buffers.load(spec, shard, tensors[spec.name])
    buffers.end_fill()
    return buffers


def filled(chosen: list[int]) -> Buffers:
    slot = FakeSlot()
    tensors = {
        f"{PREFIX}.experts.{6 + expert}.{projection}.weight": slot.experts(projection)[0][expert]
        for projection in ("up_proj", "down_proj")
        for expert in chosen
    }
    return fill(Buffers(6, CPU), 5, tensors | {f"{PREFIX}.in_proj.weight": torch.ones(2, 2)})


def test_both_sources_agree() -> None:
    slot = SlotWeights(FakeSlot())  # type: ignore[arg-type]
    for projection in ("up_proj", "down_proj"):
        for chosen in ([0, 1, 2], [2], [0, 2]):
            expected = slot.experts(projection, chosen)
            assert torch.equal(expected, filled([0, 1, 2]).experts(projection, chosen))
            assert torch.equal(expected, filled(chosen).experts(projection, chosen))
    name = f"{PREFIX}.in_proj.weight"
    assert torch.equal(slot.weight(name), filled([0]).weight(name))


def test_buffers_are_refilled_in_place_with_other_experts() -> None:
    buffers = filled([0, 2])
    before = buffers.experts("up_proj", [0]).data_ptr()
    prefix = "backbone.layers.7.mixer.experts"
    fill(
        buffers,
        7,
        {f"{prefix}.{e}.up_proj.weight": torch.full((2, 4), float(e)) for e in (7, 8)},
    )
    stack = buffers.experts("up_proj", [1, 2])
    assert stack[:, 0, 0].tolist() == [7.0, 8.0]
    assert stack.data_ptr() == before
    with pytest.raises(AssertionError):
        buffers.weight(f"{PREFIX}.in_proj.weight")  # of the layer before


def test_evenly_spaced_experts_are_not_copied() -> None:
    stack = torch.arange(24.0).view(6, 2, 2)
    for chosen, is_view in (([0, 1, 2], True), ([1, 3, 5], True), ([4], True), ([0, 1, 3], False)):
        taken = take(stack, chosen)
        assert torch.equal(taken, stack[torch.tensor(chosen)])
        assert (taken.data_ptr() == stack[chosen[0]].data_ptr()) is is_view
    assert take(stack, []).shape == (0, 2, 2)
    assert take(stack, [2, 1]).tolist() == stack[[2, 1]].tolist()
