"""The streams: relative errors accumulated and alone, clipped inputs, padding, no text changed."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.scales import InputScale
from pipeline.evaluation.streams import Streams
from pipeline.nvfp4.activations import fp8_input, nvfp4_input
from pipeline.nvfp4.formats import Format
from pipeline.runtime.collectives import Ranks
from pipeline.sharding import ParallelDims
from pipeline.weights import Quantizer, Tap
from tests.distributed.helpers import run_ranks

CPU = torch.device("cpu")
VOCAB, HIDDEN = 19, 32
GENERATOR = torch.Generator().manual_seed(2)
IDS = torch.randint(VOCAB, (3, 12), generator=GENERATOR)
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=GENERATOR)
WEIGHTS = torch.randn(2, HIDDEN, HIDDEN, generator=GENERATOR) / HIDDEN**0.5
SERVED = WEIGHTS + 0.05 * torch.randn(WEIGHTS.shape, generator=GENERATOR)
FLUSHED = SERVED * (torch.rand(WEIGHTS.shape, generator=GENERATOR) < 0.9)
BY_MODE = {ServingMode.w4a4: SERVED, ServingMode.w4a16: FLUSHED}
# Some of the inputs, which are normal, lie beyond 448 * 0.004 = 1.8 and 2688 * 0.0005 = 1.3.
SCALES = [{"in_proj": InputScale(Format.fp8, 0.004)}, {"in_proj": InputScale(Format.nvfp4, 5e-4)}]


class LinearSlot:
    """A layer that adds a product to its input, as slots do: in place."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.matrix = weight

    def forward(
        self, hidden: torch.Tensor, tap: Tap | None = None, quantizer: Quantizer | None = None
    ) -> torch.Tensor:
        x = hidden if quantizer is None else quantizer.quantize("in_proj", hidden)
        return hidden.add_(F.linear(x, self.matrix))


def served_input(layer: int, mode: ServingMode, x: torch.Tensor) -> torch.Tensor:
    item = SCALES[layer]["in_proj"]
    if item.format is Format.fp8:
        return fp8_input(x, torch.tensor(item.scale), "reference")
    if mode is ServingMode.w4a16:
        return x
    return nvfp4_input(x, torch.tensor(item.scale), "reference")


def expected() -> tuple[dict[ServingMode, list[tuple[float, float]]], dict[ServingMode, float]]:
    """All sequences at once: errors by mode and layer, and the share of clipped inputs."""
    errors, clipped = {}, {}
    for mode, weights in BY_MODE.items():
        bf16 = stream = EMBEDDING[IDS]
        errors[mode], beyond, elements = [], 0, 0
        for layer in range(2):
            after = bf16 + bf16 @ WEIGHTS[layer].T
            if layer == 0 or mode is ServingMode.w4a4:
                beyond += int((stream.abs() > SCALES[layer]["in_proj"].amax).sum())
                elements += stream.numel()
            stream = stream + served_input(layer, mode, stream) @ weights[layer].T
            alone = bf16 + served_input(layer, mode, bf16) @ weights[layer].T
            pair = [float((x - after).norm() / after.norm()) for x in (stream, alone)]
            errors[mode].append((pair[0], pair[1]))
            bf16 = after
        clipped[mode] = beyond / elements
    return errors, clipped


def moved(dims: ParallelDims, rank: int, micro_batch: int) -> Streams:
    streams = Streams(
        IDS,
        EMBEDDING,
        dims,
        rank,
        layers=2,
        micro_batch=micro_batch,
        dtype=torch.float32,
        device=CPU,
        modes=tuple(ServingMode),
        backend="reference",
    )
    for batch in streams.batches:  # what a padding sequence holds must not matter
        batch.hidden[:, batch.weights == 0] *= 1e3
    for layer in range(2):
        streams.bf16(LinearSlot(WEIGHTS[layer]))  # type: ignore[arg-type]
        for mode in streams.modes:
            slot = LinearSlot(BY_MODE[mode][layer])
            streams.quantized(layer, mode, slot, SCALES[layer])  # type: ignore[arg-type]
        streams.end_layer()
    return streams


def found_errors(rank: int, world: int, tp: int) -> list[dict[str, tuple[float, float]]]:
    streams = moved(ParallelDims(world=world, tp=tp), rank, 2)
    ranks = Ranks(dist.group.WORLD if world > 1 else None, None, None, CPU)
    return [{mode.value: pair for mode, pair in row.items()} for row in streams.errors(ranks)]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_errors_and_clipped_inputs(micro_batch: int) -> None:
    streams = moved(ParallelDims(), 0, micro_batch)
    errors, clipped = expected()
    ranks = Ranks(None, None, None, CPU)
    for layer, row in enumerate(streams.errors(ranks)):
        for mode in ServingMode:
            assert row[mode] == pytest.approx(errors[mode][layer], rel=1e-5), (layer, mode)
    assert errors[ServingMode.w4a4][0][0] == errors[ServingMode.w4a4][0][1]
    assert errors[ServingMode.w4a4][1][0] > errors[ServingMode.w4a4][1][1]
    assert 0.01 < clipped[ServingMode.w4a16] < clipped[ServingMode.w4a4] < 0.5
    assert streams.clipped(ranks) == pytest.approx(clipped, rel=1e-12)


def test_the_bf16_stream_is_the_model_s() -> None:
    streams = moved(ParallelDims(), 0, 2)
    hidden = EMBEDDING[IDS]
    for weight in WEIGHTS:
        hidden = hidden + hidden @ weight.T
    for batch in streams.batches:
        wanted = hidden[batch.sequences].transpose(0, 1)
        torch.testing.assert_close(batch.hidden, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_add_up_their_parts(world: int, tp: int) -> None:
    everyone = run_ranks(found_errors, world, world, tp)
    assert all(found == everyone[0] for found in everyone)
    errors, _ = expected()
    for layer, row in enumerate(everyone[0]):
        for mode in ServingMode:
            assert row[mode.value] == pytest.approx(errors[mode][layer], rel=1e-5), (layer, mode)
