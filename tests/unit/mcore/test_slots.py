"""One rank's slots against transformers, layer kind by layer kind."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.architecture import Architecture, LayerType, TensorSpec, layer_tensors
from pipeline.errors import LayoutError, SourceError
from pipeline.mcore import backend, cpu
from pipeline.mcore.slots import build_slots
from pipeline.sharding import ParallelDims, Shard, shard_of
from tests.unit.mcore.models import (
    BASE,
    BATCH,
    SEQ_LEN,
    VARIANTS,
    RecordingTap,
    Reference,
    expected_logits,
    logits_of,
    make_reference,
    make_slots,
    reader,
    run_layers,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups() -> Iterator[backend.Groups]:
    yield backend.start(ParallelDims(), 0, CPU)
    backend.stop()


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {variant: make_reference(variant) for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_amax_match_transformers(
    groups: backend.Groups, references: dict[str, Reference], variant: str
) -> None:
    reference = references[variant]
    tap = RecordingTap(reference.architecture.n_routed_experts)
    hidden = run_layers(reference, groups, make_slots(reference, groups), tap)
    difference = (logits_of(reference, hidden) - expected_logits(reference, groups)).abs().max()
    assert difference < 1e-4
    expected = reference.amax
    if not reference.architecture.has_shared_experts:
        expected = {name: value for name, value in expected.items() if "shared" not in name}
    assert tap.amax == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variant", ["all_kinds", "wide", "mamba_biases"])
def test_fill_overwrites_everything(
    groups: backend.Groups, references: dict[str, Reference], variant: str
) -> None:
    reference = references[variant]
    slots = make_slots(reference, groups)
    for layer, layer_type in enumerate(reference.architecture.layers):
        slot = slots[layer_type]
        for tensor in slot.tensors().values():
            tensor.fill_(torch.nan)
        slot.fill(layer, reader(reference.tensors))
        for name, tensor in slot.tensors().items():
            assert tensor.isfinite().all(), name
        output = slot.forward(torch.randn(SEQ_LEN, BATCH, reference.architecture.hidden_size))
        assert output.isfinite().all()


@pytest.mark.parametrize("variant", ["all_kinds", "wide"])
def test_every_tensor_of_a_layer_matters(
    groups: backend.Groups, references: dict[str, Reference], variant: str
) -> None:
    """Were a tensor ignored, agreement with a model of special weights would prove little."""
    reference = references[variant]
    slots = make_slots(reference, groups)
    hidden = torch.randn(SEQ_LEN, BATCH, reference.architecture.hidden_size)
    for layer, layer_type in enumerate(reference.architecture.layers[:4]):
        slots[layer_type].fill(layer, reader(reference.tensors))
        output = slots[layer_type].forward(hidden.clone())
        for spec in layer_tensors(reference.architecture, layer):
            changed = {**reference.tensors, spec.name: reference.tensors[spec.name].flip(0)}
            slots[layer_type].fill(layer, reader(changed))
            assert not torch.equal(slots[layer_type].forward(hidden.clone()), output), spec.name


def test_fill_keeps_source_dtypes(groups: backend.Groups, references: dict[str, Reference]) -> None:
    """bf16 slots: the router, A_log, D and dt_bias keep what the source says, layer by layer."""
    reference = references["all_kinds"]
    slots = make_slots(reference, groups, dtype=torch.bfloat16)

    def source(name: str) -> torch.dtype:
        layer = int(name.split(".")[2])
        return torch.float32 if layer < 4 else torch.bfloat16

    tensors = {
        name: tensor.to(source(name)) if ".layers." in name else tensor
        for name, tensor in reference.tensors.items()
    }
    hidden = torch.randn(SEQ_LEN, BATCH, 64, dtype=torch.bfloat16)
    for layer, layer_type in enumerate(reference.architecture.layers):
        slot = slots[layer_type]
        slot.fill(layer, reader(tensors))
        dtypes = {name.rpartition(".")[2]: t.dtype for name, t in slot.tensors().items()}
        prefix = f"backbone.layers.{layer}.mixer."
        if layer_type is LayerType.mamba:
            kept = source(prefix)
            assert (dtypes["A_log"], dtypes["D"], dtypes["dt_bias"]) == (kept, kept, kept)
            assert slot.weight(f"{prefix}in_proj.weight").dtype is torch.bfloat16
        if layer_type is LayerType.moe:
            router = {n: t for n, t in slot.tensors().items() if ".router." in n}
            assert router["mixer.router.weight"].dtype is source(prefix)
            bias = tensors[f"{prefix}gate.e_score_correction_bias"]
            assert torch.equal(router["mixer.router.expert_bias"], bias.float())
            assert slot.experts("up_proj")[0].dtype is torch.bfloat16
        assert slot.forward(hidden.clone()).dtype is torch.bfloat16


def test_an_expert_without_tokens_is_fine(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    reference = references["moe"]
    bias = torch.zeros(8)
    bias[5] = -10.0
    name = "backbone.layers.0.mixer.gate.e_score_correction_bias"
    slot = make_slots(reference, groups)[LayerType.moe]
    slot.fill(0, reader({**reference.tensors, name: bias}))
    tap = RecordingTap(8)
    assert slot.forward(torch.randn(SEQ_LEN, BATCH, 64), tap).isfinite().all()
    assert tap.tokens_per_expert[5] == 0
    assert tap.tokens_per_expert.sum() == SEQ_LEN * BATCH * 3


def test_a_misshapen_tensor_is_refused_and_empties_the_slot(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    reference = references["attention"]
    slot = make_slots(reference, groups)[LayerType.attention]
    slot.fill(0, reader(reference.tensors))

    def read(spec: TensorSpec, shard: Shard) -> torch.Tensor:
        tensor = reader(reference.tensors)(spec, shard)
        return tensor[:-1] if spec.name.endswith("k_proj.weight") else tensor

    with pytest.raises(
        SourceError, match=r"layers\.1\.mixer\.k_proj\.weight.*\(31, 64\).*\(32, 64"
    ):
        slot.fill(1, read)
    assert slot.layer is None
    with pytest.raises(AssertionError, match="forward before fill"):
        slot.forward(torch.zeros(4, 1, 64))


def test_only_the_held_layer_can_be_read(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    reference = references["attention"]
    slot = make_slots(reference, groups)[LayerType.attention]
    slot.fill(1, reader(reference.tensors))
    name = "backbone.layers.1.mixer.v_proj.weight"
    assert torch.equal(slot.weight(name), reference.tensors[name])
    with pytest.raises(AssertionError, match=r"layers\.1"):
        slot.weight("backbone.layers.0.mixer.v_proj.weight")


def test_an_unfilled_tensor_is_noticed(
    groups: backend.Groups, references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = references["mamba"]
    slot = make_slots(reference, groups)[LayerType.mamba]
    specs = [s for s in layer_tensors(reference.architecture, 0) if not s.name.endswith("dt_bias")]
    monkeypatch.setattr("pipeline.mcore.slots.layer_tensors", lambda *_: specs)
    with pytest.raises(AssertionError, match=r"layer 0: not loaded: \['mixer\.dt_bias'\]"):
        slot.fill(0, reader(reference.tensors))
    assert slot.layer is None


def test_an_element_without_a_tensor_is_noticed(
    groups: backend.Groups, references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = references["attention"]
    specs = [s for s in layer_tensors(reference.architecture, 0) if "v_proj" not in s.name]
    monkeypatch.setattr("pipeline.mcore.loading.layer_tensors", lambda *_: specs)
    with pytest.raises(AssertionError, match=r"qkv_proj\.weight: 6144 of 8192 elements"):
        make_slots(reference, groups)


def test_tensors_may_be_made_in_the_slot(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    """One by one, in any order, each in the dtype of the slot or (where it is kept) the source."""
    reference = references["all_kinds"]
    filled = make_slots(reference, groups, dtype=torch.bfloat16)
    made = make_slots(reference, groups, dtype=torch.bfloat16)
    for layer, layer_type in enumerate(reference.architecture.layers):
        filled[layer_type].fill(layer, reader(reference.tensors))
        slot = made[layer_type]
        slot.begin_fill(layer)
        for spec in reversed(layer_tensors(reference.architecture, layer)):
            shard = shard_of(spec, reference.architecture, groups.dims, groups.rank)
            assert shard is not None
            source = reference.tensors[spec.name]
            target = slot.target_of(spec, source.dtype)
            kept = spec.keeps_source_dtype
            assert target.dtype is (source.dtype if kept else torch.bfloat16)
            slot.load(spec, shard, target.copy_(source))
            assert slot.target_of(spec).data_ptr() == target.data_ptr()
        slot.end_fill()
        assert slot.layer == layer
        for name, tensor in filled[layer_type].tensors().items():
            assert torch.equal(slot.tensors()[name], tensor), name


def test_hidden_states_are_moved_on_in_place(
    groups: backend.Groups, references: dict[str, Reference]
) -> None:
    reference = references["attention"]
    slot = make_slots(reference, groups)[LayerType.attention]
    slot.fill(0, reader(reference.tensors))
    hidden = torch.randn(SEQ_LEN, BATCH, 64)
    before = hidden.clone()
    assert slot.forward(hidden).data_ptr() == hidden.data_ptr()
    assert not torch.equal(hidden, before)


def test_layouts_that_do_not_fit_are_refused(groups: backend.Groups) -> None:
    architecture = Architecture.from_hf_config(BASE)
    with pytest.raises(LayoutError, match=r"must divide num_attention_heads=4"):
        _build(architecture, groups, ParallelDims(world=3, tp=3))
    with pytest.raises(LayoutError, match=r"length: found 25; .*tp=2"):
        _build(architecture, groups, ParallelDims(world=2, tp=2), seq_len=25)


def test_the_stand_in_is_idempotent_and_removable() -> None:
    installed = hasattr(torch.cuda.current_device, "original")
    cpu.install()
    cpu.install()
    assert str(torch.cuda.current_device()) == "cpu"
    cpu.remove()
    cpu.remove()
    assert not hasattr(torch.cuda.current_device, "original")
    if installed:
        cpu.install()


def _build(
    architecture: Architecture, groups: backend.Groups, dims: ParallelDims, seq_len: int = 8
) -> None:
    build_slots(
        architecture, dims, 0, groups, device=CPU, compute_dtype=torch.float32, seq_len=seq_len
    )
