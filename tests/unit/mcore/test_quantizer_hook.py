"""What projections read where a quantizer is set: which tensors, and what comes of it."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.architecture import Architecture, LayerType
from pipeline.mcore import backend
from pipeline.sharding import ParallelDims
from tests.unit.mcore.models import (
    BASE,
    BATCH,
    SEQ_LEN,
    RecordingTap,
    Reference,
    expected_logits,
    logits_of,
    make_reference,
    make_slots,
    reader,
    run_layers,
)
from tests.unit.mcore.quantized_models import OurQuantizer, Scale, scales_from, served_reference

CPU = torch.device("cpu")
TOKENS = SEQ_LEN * BATCH
BITWISE = ("all_kinds", "wide", "moe_without_shared", "mamba_biases")
SERVED = ("all_kinds", "mamba", "attention_biases", "mlp_biases", "moe", "moe_without_shared")
SERVED = (*SERVED, "wide", "moe_groups")


class Identity:
    """Returns what it is given and remembers it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, torch.Tensor]] = []

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((projection, x.clone()))
        return x


class Copies:
    """A new tensor of the same values, as real quantizers make; keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        self.given.append((projection, x, x.clone()))
        return x.clone()


@pytest.fixture(scope="module")
def groups() -> Iterator[backend.Groups]:
    yield backend.start(ParallelDims(), 0, CPU)
    backend.stop()


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {variant: make_reference(variant) for variant in {*BITWISE, *SERVED}}


def widths(a: Architecture, layer_type: LayerType) -> dict[str, tuple[int, ...]]:
    """Names and the dims after the tokens; `experts.down_proj` has a row for each choice."""
    if layer_type is LayerType.mamba:
        return {"in_proj": (a.hidden_size,), "out_proj": (a.mamba_intermediate_size,)}
    if layer_type is LayerType.attention:
        cached = (a.num_key_value_heads, a.head_dim)
        queries = a.num_attention_heads * a.head_dim
        return {
            "qkv": (a.hidden_size,),
            "k_cache": cached,
            "v_cache": cached,
            "o_proj": (queries,),
        }
    if layer_type is LayerType.mlp:
        return {"up_proj": (a.hidden_size,), "down_proj": (a.intermediate_size,)}
    names = {
        "experts.up_proj": (a.expert_input_size,),
        "experts.down_proj": (a.moe_intermediate_size,),
    }
    if a.moe_latent_size is not None:
        names |= {"fc1_latent_proj": (a.hidden_size,), "fc2_latent_proj": (a.moe_latent_size,)}
    if a.has_shared_experts:
        names["shared_experts.up_proj"] = (a.hidden_size,)
        names["shared_experts.down_proj"] = (a.moe_shared_expert_intermediate_size,)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", BITWISE)
def test_every_projection_is_asked_once_and_an_identity_changes_no_bit(
    groups: backend.Groups, references: dict[str, Reference], variant: str, dtype: torch.dtype
) -> None:
    architecture = references[variant].architecture
    slots = make_slots(references[variant], groups, dtype=dtype)
    hidden = torch.randn(SEQ_LEN, BATCH, architecture.hidden_size).to(dtype)
    for layer, layer_type in enumerate(architecture.layers):
        slot = slots[layer_type]
        slot.fill(layer, reader(references[variant].tensors))
        plain = slot.forward(hidden.clone())
        identity, copies = Identity(), Copies()
        assert slot.forward(hidden.clone(), None, identity).equal(plain)
        assert slot.forward(hidden.clone(), None, copies).equal(plain)
        assert slot.forward(hidden.clone()).equal(plain)  # it does not outlive its forward pass
        wanted = widths(architecture, layer_type)
        assert sorted(name for name, _ in identity.seen) == sorted(wanted)
        for name, x in identity.seen:
            copied = architecture.num_experts_per_tok if name == "experts.down_proj" else 1
            assert x.dtype is dtype
            assert x.numel() == TOKENS * copied * torch.Size(wanted[name]).numel(), name
            assert x.shape[-len(wanted[name]) :] == wanted[name]
        # An in-place step on what a projection was given would have changed what the next reads.
        reused = {"in_proj", "qkv", "up_proj", "fc1_latent_proj", "shared_experts.up_proj"}
        for name, x, before in copies.given:
            assert name not in reused or x.equal(before), name


@pytest.mark.parametrize("variant", BITWISE)
def test_quantizer_sees_what_the_tap_measures(
    groups: backend.Groups, references: dict[str, Reference], variant: str
) -> None:
    """In-place squares and the epilogue of grouped products included."""
    reference = references[variant]
    slots = make_slots(reference, groups)
    tap, identity = RecordingTap(reference.architecture.n_routed_experts), Identity()
    run_layers(reference, groups, slots, tap, identity)
    amax: dict[str, float] = {}
    for name, x in identity.seen:
        amax[name] = max(amax.get(name, 0.0), x.abs().max().item())
    assert amax == tap.amax


def test_the_tap_sees_values_before_the_quantizer(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    class Zeros:
        def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    reference = references["all_kinds"]
    slots = make_slots(reference, groups)
    hidden = torch.randn(SEQ_LEN, BATCH, reference.architecture.hidden_size)
    slot = slots[LayerType.attention]
    slot.fill(reference.architecture.layers.index(LayerType.attention), reader(reference.tensors))
    tap = RecordingTap(1)
    moved = slot.forward(hidden.clone(), tap, Zeros())
    assert tap.amax["qkv"] > 1
    assert tap.amax["k_cache"] == 0  # what zeros give without biases
    assert moved.equal(hidden)


def test_a_quantizer_that_fails_is_gone_afterwards(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    class Fails:
        def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(projection)

    reference = references["mamba_biases"]
    slot = make_slots(reference, groups)[LayerType.mamba]
    slot.fill(0, reader(reference.tensors))
    hidden = torch.randn(SEQ_LEN, BATCH, 64)
    plain = slot.forward(hidden.clone())
    with pytest.raises(RuntimeError, match="in_proj"):
        slot.forward(hidden.clone(), None, Fails())
    assert slot.forward(hidden.clone()).equal(plain)


def test_the_router_reads_values_as_they_are(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    class Negates:
        def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
            return -x

    class Chosen(RecordingTap):
        def routing(self, chosen_TK: torch.Tensor) -> None:
            self.chosen = chosen_TK.clone()

    for variant in ("all_kinds", "moe"):  # with latents, and experts that read the same rows
        reference = references[variant]
        slot = make_slots(reference, groups)[LayerType.moe]
        slot.fill(reference.architecture.layers.index(LayerType.moe), reader(reference.tensors))
        hidden = torch.randn(SEQ_LEN, BATCH, 64)
        plain, quantized = Chosen(8), Chosen(8)
        a = slot.forward(hidden.clone(), plain)
        b = slot.forward(hidden.clone(), quantized, Negates())
        assert quantized.chosen.equal(plain.chosen)
        assert not a.equal(b)


@pytest.mark.parametrize("variant", SERVED)
def test_logits_are_those_of_transformers_with_quantized_inputs(
    groups: backend.Groups, references: dict[str, Reference], variant: str
) -> None:
    scales = scales_from(references[variant].amax)
    served = served_reference(variant, scales)
    hidden = run_layers(served, groups, make_slots(served, groups), None, OurQuantizer(scales))
    expected = expected_logits(served, groups)
    assert (logits_of(served, hidden) - expected).abs().max() < 1e-3
    cost = expected - expected_logits(references[variant], groups)
    assert cost.norm() > 0.05 * expected.norm()  # otherwise agreement would prove nothing


def test_every_projection_matters(groups: backend.Groups, references: dict[str, Reference]) -> None:
    """Were one not quantized, agreement would be lost."""

    class AllBut(OurQuantizer):
        def __init__(self, scales: dict[str, Scale], spared: str) -> None:
            super().__init__(scales)
            self.spared = spared

        def quantize(self, projection: str, x: torch.Tensor) -> torch.Tensor:
            return x if projection == self.spared else super().quantize(projection, x)

    scales = scales_from(references["all_kinds"].amax)
    served = served_reference("all_kinds", scales)
    slots = make_slots(served, groups)
    expected = expected_logits(served, groups)
    every = {name for kind in LayerType for name in widths(Architecture.from_hf_config(BASE), kind)}
    assert every == set(scales)
    for name in sorted(every):
        hidden = run_layers(served, groups, slots, None, AllBut(scales, name))
        assert (logits_of(served, hidden) - expected).abs().max() > 1e-2, name
