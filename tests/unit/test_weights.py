"""Weights from a slot and weights as they were read give packing the same matrices."""

import torch

from pipeline.weights import SlotWeights, StreamedWeights

PREFIX = "backbone.layers.5.mixer.experts"


class FakeSlot:
    """Three local experts, from expert 6 on, and one dense weight."""

    def __init__(self) -> None:
        self.stack = torch.arange(3 * 2 * 4.0).view(3, 2, 4)

    def weight(self, name: str) -> torch.Tensor:
        return {"dense": torch.ones(2, 2)}[name]

    def experts(self, projection: str) -> tuple[torch.Tensor, int]:
        return (self.stack if projection == "up_proj" else self.stack.mT), 6


def streamed() -> StreamedWeights:
    stack = FakeSlot().stack
    tensors = {f"{PREFIX}.{6 + e}.up_proj.weight": stack[e] for e in range(3)}
    tensors |= {f"{PREFIX}.{6 + e}.down_proj.weight": stack[e].T for e in range(3)}
    return StreamedWeights(5, 6, tensors | {"dense": torch.ones(2, 2)}, torch.device("cpu"))


def test_both_sources_agree() -> None:
    slot = SlotWeights(FakeSlot())  # type: ignore[arg-type]
    for projection in ("up_proj", "down_proj"):
        for chosen in ([0, 1, 2], [2], [0, 2]):
            assert torch.equal(
                slot.experts(projection, chosen), streamed().experts(projection, chosen)
            )
    assert torch.equal(slot.weight("dense"), streamed().weight("dense"))


def test_all_experts_of_a_slot_are_not_copied() -> None:
    slot = FakeSlot()
    weights = SlotWeights(slot)  # type: ignore[arg-type]
    assert weights.experts("up_proj", [0, 1, 2]).data_ptr() == slot.stack.data_ptr()
    assert weights.experts("up_proj", [1]).shape == (1, 2, 4)
