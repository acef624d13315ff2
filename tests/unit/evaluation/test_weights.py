"""Weights quantized and dequantized in their slot: what the packed bytes stand for, and back."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pipeline.architecture import LayerType, TensorSpec
from pipeline.evaluation import weights as weights_module
from pipeline.evaluation.weights import ServedWeights
from pipeline.mcore import backend
from pipeline.mcore.slots import Slot, build_slots
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import BLOCK_SIZE, HOPPER_FLUSH_BELOW, Format
from pipeline.nvfp4.reference import PackedWeight
from pipeline.recipe import ModuleFormat
from pipeline.schedule import LayerSchedule, schedule_layers, tap_of
from pipeline.sharding import ParallelDims, shard_of
from tests.unit.test_packing import (
    ARCHITECTURE,
    ATTENTION,
    EXPERTS,
    ONE,
    SPECS,
    WEIGHTS,
    Tensors,
    mixed,
    pack,
    shard,
    swapped,
)

CPU = torch.device("cpu")
Choose = Callable[[TensorSpec], ModuleFormat]
SMALL_ROWS = range(3, 19)
SMALL = {
    f"{EXPERTS}.1.up_proj.weight",
    f"{ATTENTION}.o_proj.weight",
    "backbone.layers.0.mixer.in_proj.weight",
}


def with_small_blocks() -> Tensors:
    """Blocks of ever smaller scales: the format holds them all, Hopper's kernels do not."""
    changed = {name: weight.clone() for name, weight in WEIGHTS.items()}
    for name in SMALL:
        for row in SMALL_ROWS:
            changed[name][row, 16:48] *= 2.0 ** -(12 + row / 8)
    return changed


BF16 = with_small_blocks()
OTHERS = {
    name: torch.rand(spec.shape, generator=torch.Generator().manual_seed(5)) + 0.5
    for name, spec in SPECS.items()
    if name not in WEIGHTS
}


def stored(choose: Choose) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """By weight: the values of the packed bytes, and for NVFP4 the block scales."""
    packed, _ = pack(choose, ParallelDims(), ONE, 0, BF16)
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name in BF16:
        codes, scale = packed[name], packed[f"{name}_scale"]
        if choose(SPECS[name]).weight_format is Format.fp8:
            found[name] = (codes.float() * scale, None)
            continue
        weight = PackedWeight(codes, scale, packed[f"{name}_scale_2"])
        values = get_backend("reference").dequantize_nvfp4(weight, torch.float32)
        found[name] = (values, scale.float())
    return found


def schedules(choose: Choose, dims: ParallelDims) -> list[LayerSchedule]:
    formats = {SPECS[name].module: choose(SPECS[name]) for name in WEIGHTS}
    return schedule_layers(ARCHITECTURE, dims, formats, {})


def slots_of(dims: ParallelDims, rank: int, groups: backend.Groups) -> dict[LayerType, Slot]:
    return build_slots(
        ARCHITECTURE, dims, rank, groups, device=CPU, compute_dtype=torch.float32, seq_len=8
    )


def fill(slot: Slot, layer: int) -> None:
    def read(spec: TensorSpec, held: Any) -> torch.Tensor:
        return shard(spec, held, (BF16 | OTHERS)[spec.name])

    slot.fill(layer, read)


def held_by(slot: Slot, layer: int, dims: ParallelDims, rank: int) -> Iterator[tuple[str, Any]]:
    """This rank's shard of every projection of the layer that a slot holds, as it is now."""
    for name in WEIGHTS:
        spec = SPECS[name]
        held = shard_of(spec, ARCHITECTURE, dims, rank)
        if spec.layer != layer or held is None:
            continue
        if spec.is_routed_expert:
            stack, first = slot.experts(spec.module.rpartition(".")[2])
            yield name, (held, stack[spec.expert - first])
        else:
            yield name, (held, slot.weight(name))


def assert_holds(
    slot: Slot, layer: int, wanted: Tensors, dims: ParallelDims | None = None, rank: int = 0
) -> None:
    dims = dims or ParallelDims()
    seen = 0
    for name, (held, tensor) in held_by(slot, layer, dims, rank):
        assert torch.equal(tensor, shard(SPECS[name], held, wanted[name]).float()), name
        seen += 1
    assert seen


def flushed(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return values
    keep = (scale >= HOPPER_FLUSH_BELOW).repeat_interleave(BLOCK_SIZE, -1)
    return torch.where(keep, values, 0.0)


@pytest.fixture(scope="module")
def groups() -> Iterator[backend.Groups]:
    yield backend.start(ParallelDims(), 0, CPU)
    backend.stop()


@pytest.fixture(scope="module")
def slots(groups: backend.Groups) -> dict[LayerType, Slot]:
    return slots_of(ParallelDims(), 0, groups)


def serve(slot: Slot, schedule: LayerSchedule) -> ServedWeights:
    fill(slot, schedule.layer)
    return ServedWeights(schedule, slot, ARCHITECTURE, ParallelDims(), ONE, "reference")


@pytest.mark.parametrize("piece", [2**27, 3000, 64])
@pytest.mark.parametrize("choose", [mixed, swapped])
def test_a_slot_holds_what_the_packed_bytes_stand_for(
    choose: Choose,
    piece: int,
    slots: dict[LayerType, Slot],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVFP4 and FP8 with a search, q, k and v with one scale, whole or in pieces."""
    monkeypatch.setattr(weights_module, "_PIECE", piece)
    wanted = {name: values for name, (values, _) in stored(choose).items()}
    for schedule in schedules(choose, ParallelDims()):
        slot = slots[schedule.layer_type]
        served = serve(slot, schedule)
        assert_holds(slot, schedule.layer, BF16)
        served.dequantize()
        assert_holds(slot, schedule.layer, wanted)
        served.dequantize()  # none twice
        assert_holds(slot, schedule.layer, wanted)


@pytest.mark.parametrize("piece", [2**27, 64])
def test_a_flush_zeroes_the_blocks_of_small_scales_and_no_others(
    piece: int, slots: dict[LayerType, Slot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "_PIECE", piece)
    by_name = stored(mixed)
    wanted = {name: flushed(*pair) for name, pair in by_name.items()}
    for name, (values, _) in by_name.items():
        zeroed = (values != wanted[name]).nonzero()
        assert bool(len(zeroed)) is (name in SMALL), name
        assert {row for row, _ in zeroed.tolist()} <= set(SMALL_ROWS)
    scales = torch.cat([by_name[name][1].flatten() for name in SMALL])
    assert (scales == HOPPER_FLUSH_BELOW).any(), "the least scale that is kept"
    for schedule in schedules(mixed, ParallelDims()):
        slot = slots[schedule.layer_type]
        served = serve(slot, schedule)
        served.dequantize()
        served.flush()
        assert_holds(slot, schedule.layer, wanted)


def test_projections_one_after_the_other(slots: dict[LayerType, Slot]) -> None:
    by_name = stored(mixed)
    schedule = schedules(mixed, ParallelDims())[1]
    slot = slots[schedule.layer_type]
    served = serve(slot, schedule)
    now = dict(BF16)
    for taps in ({"fc2_latent_proj"}, {"experts.down_proj", "shared_experts.up_proj"}):
        served.dequantize(frozenset(taps))
        now |= {n: values for n, (values, _) in by_name.items() if tap_of(SPECS[n].module) in taps}
        assert_holds(slot, 1, now)
    served.dequantize()
    assert_holds(slot, 1, {name: values for name, (values, _) in by_name.items()})
    served.flush()
    assert_holds(slot, 1, {name: flushed(*pair) for name, pair in by_name.items()})


@pytest.mark.parametrize(
    ("layer", "taps"), [(0, {"in_proj"}), (1, {"fc1_latent_proj"}), (2, {"qkv"}), (2, {"k_cache"})]
)
def test_a_group_is_quantized_for_a_while(
    layer: int, taps: set[str], slots: dict[LayerType, Slot]
) -> None:
    by_name = stored(mixed)
    schedule = schedules(mixed, ParallelDims())[layer]
    slot = slots[schedule.layer_type]
    served = serve(slot, schedule)
    chosen = {name for name in BF16 if tap_of(SPECS[name].module) in taps}
    inside = {name: by_name[name][0] if name in chosen else BF16[name] for name in BF16}
    before = {name: tensor.clone() for name, tensor in slot.tensors().items()}
    with served.only(frozenset(taps)):
        assert_holds(slot, layer, inside)
        changed = [n for n, t in slot.tensors().items() if not torch.equal(t, before[n])]
        assert bool(changed) is bool(chosen)
    for name, tensor in slot.tensors().items():
        assert torch.equal(tensor, before[name]), name
    served.flush()  # there is nothing to flush any more
    assert_holds(slot, layer, BF16)
    served.dequantize()
    assert_holds(slot, layer, {name: values for name, (values, _) in by_name.items()})
    served.flush()
    assert_holds(slot, layer, {name: flushed(*pair) for name, pair in by_name.items()})


def test_routed_experts_are_not_kept_twice(slots: dict[LayerType, Slot]) -> None:
    schedule = schedules(mixed, ParallelDims())[1]
    served = serve(slots[schedule.layer_type], schedule)
    with pytest.raises(AssertionError, match="too large"):
        served.only(frozenset({"experts.up_proj"})).__enter__()
