"""An MoE layer on one rank: what its taps see, and what a plain formulation gives."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from pipeline.architecture import LayerType
from pipeline.mcore import backend
from pipeline.sharding import ParallelDims
from tests.unit.mcore.models import (
    BATCH,
    SEQ_LEN,
    RecordingTap,
    Reference,
    make_reference,
    make_slots,
    reader,
)


@pytest.fixture
def groups() -> Iterator[backend.Groups]:
    yield backend.start(ParallelDims(), 0, torch.device("cpu"))
    backend.stop()


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {name: make_reference(name) for name in ("moe", "moe_biases", "moe_without_shared")}


def test_amax_is_that_of_inputs_before_probabilities(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    reference = references["moe"]
    slot = make_slots(reference, groups)[LayerType.moe]
    slot.fill(0, reader(reference.tensors))
    moe, tap = slot._mixer, RecordingTap(8)
    slot._probe.tap = tap
    hidden = torch.randn(SEQ_LEN, BATCH, 64)
    with torch.inference_mode():
        moe(hidden)
    slot._probe.tap = None

    tokens = hidden.flatten(0, 1)
    chosen_TK, _ = moe.router(tokens)
    inner_TEN = torch.einsum("th,enh->ten", tokens, slot.experts("up_proj")[0]).relu().square()
    index_TKN = chosen_TK.long().unsqueeze(-1).expand(-1, -1, inner_TEN.shape[-1])
    assert tap.tokens == SEQ_LEN * BATCH
    assert torch.equal(tap.tokens_per_expert, chosen_TK.flatten().bincount(minlength=8))
    assert tap.amax["experts.up_proj"] == tokens.abs().max()
    assert tap.amax["experts.down_proj"] == pytest.approx(inner_TEN.gather(1, index_TKN).max())


@pytest.mark.parametrize("variant", ["moe", "moe_biases", "moe_without_shared"])
def test_layer_is_its_plain_formulation(
    groups: backend.Groups, references: dict[str, Reference], variant: str
) -> None:
    """With latents or without, with biases, with a shared expert or without."""
    reference = references[variant]
    slot = make_slots(reference, groups)[LayerType.moe]
    slot.fill(0, reader(reference.tensors))
    moe, hidden = slot._mixer, torch.randn(SEQ_LEN, BATCH, 64)
    weights = {
        name.removeprefix("backbone.layers.0.mixer."): tensor
        for name, tensor in reference.tensors.items()
    }

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def feed_forward(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(linear(x, f"{name}up_proj").relu().square(), f"{name}down_proj")

    with torch.inference_mode():
        output = moe(hidden.clone())
        tokens = hidden.flatten(0, 1)
        has_latents = "fc1_latent_proj.weight" in weights
        latents = linear(tokens, "fc1_latent_proj") if has_latents else tokens
        expected = torch.zeros_like(latents)
        for token, (chosen_K, probs_K) in enumerate(zip(*moe.router(tokens), strict=True)):
            for expert, prob in zip(chosen_K.tolist(), probs_K, strict=True):
                expected[token] += prob * feed_forward(latents[token], f"experts.{expert}.")
        if has_latents:
            expected = linear(expected, "fc2_latent_proj")
        if reference.architecture.has_shared_experts:
            expected += feed_forward(tokens, "shared_experts.")
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
