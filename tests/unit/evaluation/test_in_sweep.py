"""A layer beside its calibration: what is not computed again, and that no figure shows it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pipeline.architecture import LayerType, Role, TensorSpec
from pipeline.evaluation.in_sweep import InSweep
from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.streams import Streams
from pipeline.mcore import backend
from pipeline.mcore.slots import Slot
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.recipe import KVFormat, ModuleFormat
from pipeline.schedule import schedule_layers
from pipeline.sharding import ParallelDims
from tests.unit.evaluation.test_weights import fill, slots_of
from tests.unit.test_packing import ARCHITECTURE, ONE, SPECS, WEIGHTS, mixed

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(7)
IDS = torch.randint(ARCHITECTURE.vocab_size, (3, 8), generator=GENERATOR)
EMBEDDING = torch.randn(ARCHITECTURE.vocab_size, ARCHITECTURE.hidden_size, generator=GENERATOR)
BF16 = ModuleFormat(Format.bf16)
MODES = tuple(ServingMode)
Choose = Callable[[TensorSpec], ModuleFormat]


def with_inputs(spec: TensorSpec) -> ModuleFormat:
    chosen = mixed(spec)
    return dataclasses.replace(chosen, input_format=chosen.weight_format)


def fp8(spec: TensorSpec) -> ModuleFormat:
    return ModuleFormat(Format.fp8, input_format=Format.fp8)


def experts_alone(spec: TensorSpec) -> ModuleFormat:
    """Without quantized inputs: the modes differ in the flushed blocks."""
    if spec.role is Role.routed_expert:
        return ModuleFormat(Format.nvfp4, WeightMethod.max)
    return BF16


@pytest.fixture(scope="module")
def slots() -> Iterator[dict[LayerType, Slot]]:
    yield slots_of(ParallelDims(), 0, backend.start(ParallelDims(), 0, CPU))
    backend.stop()


def visited(choose: Choose, kv: bool, slots: dict[LayerType, Slot]) -> tuple[Streams, list[int]]:
    """The streams after all layers, and how often each layer computed for them."""
    streams = Streams(
        IDS,
        EMBEDDING,
        ParallelDims(),
        0,
        layers=3,
        micro_batch=2,
        dtype=torch.float32,
        device=CPU,
        modes=MODES,
        backend="reference",
    )
    in_sweep = InSweep(
        *(ARCHITECTURE, ParallelDims(), ONE, streams, "reference", "", torch.float32)
    )
    formats = {SPECS[name].module: choose(SPECS[name]) for name in WEIGHTS}
    cache = {2: KVFormat(constant_amax=None)} if kv else {}
    calls = []
    for schedule in schedule_layers(ARCHITECTURE, ParallelDims(), formats, cache):
        slot = slots[schedule.layer_type]
        fill(slot, schedule.layer)
        scalars = {f"{module}.input_scale": 1e-3 for module in formats}
        for letter in "kv":
            scalars[f"backbone.layers.2.mixer.{letter}_proj.{letter}_scale"] = 1e-3
        counted = Counting(slot)
        in_sweep.visit(schedule, counted, scalars)  # type: ignore[arg-type]
        calls.append(counted.calls)
    return streams, calls


class Counting:
    """A slot that counts."""

    def __init__(self, slot: Slot) -> None:
        self.slot, self.calls = slot, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slot, name)

    def forward(self, *given: Any, **options: Any) -> torch.Tensor:
        self.calls += 1
        return self.slot.forward(*given, **options)


# Of two micro-batches: BF16, two modes' streams, and the layer alone where it is computed.
@pytest.mark.parametrize(
    ("choose", "kv", "expected"),
    [
        (with_inputs, True, [10, 10, 10]),
        (fp8, True, [8, 8, 8]),
        (experts_alone, False, [6, 10, 6]),
        (experts_alone, True, [6, 10, 8]),
    ],
)
def test_what_is_known_is_not_computed_and_no_figure_shows_it(
    choose: Choose,
    kv: bool,
    expected: list[int],
    slots: dict[LayerType, Slot],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams, calls = visited(choose, kv, slots)
    assert calls == expected
    quantized = Streams.quantized

    def compute_all(streams: Streams, *given: Any, **_: bool) -> None:
        quantized(streams, *given)

    monkeypatch.setattr(Streams, "quantized", compute_all)
    everything, calls = visited(choose, kv, slots)
    assert calls == [10, 10, 10]
    assert streams.errors(ONE) == everything.errors(ONE)
    assert streams.clipped(ONE) == everything.clipped(ONE)
    for mode in MODES:
        for ours, theirs in zip(streams.served[mode], everything.served[mode], strict=True):
            assert torch.equal(ours, theirs)
    alone = torch.tensor([[pair[1] for pair in row.values()] for row in streams.errors(ONE)])
    assert alone.isfinite().all()
    assert (alone == 0).tolist() == [[calls == 6] * 2 for calls in expected]
