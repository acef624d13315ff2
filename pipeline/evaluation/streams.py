"""The shadow streams: evaluation text on its way through the layers, in BF16 and as served.

In: token ids; layer by layer a slot that holds first the BF16 weights, then those of a serving
mode. Out: per layer how far the hidden states went apart, and at the end both models'
distributions over the next token (`pipeline.evaluation.fidelity`). Memory: the hidden states of
the BF16 stream before and after a layer, and those of one stream for each mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.calibration.hidden import HiddenStore, MicroBatch, same_shape
from pipeline.evaluation.inputs import TAPS, InputQuantizer
from pipeline.evaluation.records import InputRange, ServingMode
from pipeline.evaluation.scales import LayerScales
from pipeline.nvfp4.activations import sum_squares
from pipeline.runtime.collectives import Ranks, reduce_max, reduce_sum
from pipeline.sharding import ParallelDims
from pipeline.weights import LayerSlot


class Bf16Stream:
    """The evaluation sequences in BF16, before and after the layer at hand.

    Args:
        store: Their hidden states.
        backend: Name of what sums up.

    Attributes:
        store: Their hidden states.
        before: Those that entered the layer; empty between layers.
        squares: Of those that left it, the squared norm without padding, fp64 [].
    """

    def __init__(self, store: HiddenStore, backend: str) -> None:
        self.store, self._backend = store, backend
        self.before: list[torch.Tensor] = []
        self.squares = torch.zeros((), dtype=torch.float64, device=store.device)

    @torch.inference_mode()
    def move(self, slot: LayerSlot) -> None:
        """Through the layer that the slot holds; its input is kept."""
        self.before = [batch.hidden.clone() for batch in self.store.batches]
        self.squares = torch.zeros_like(self.squares)
        for batch in self.store.batches:
            batch.hidden = slot.forward(batch.hidden)
            self.squares += sum_squares(batch.hidden, batch.weights, self._backend)


class Streams:
    """The evaluation sequences of this rank, once for BF16 and once for each serving mode.

    Args:
        token_ids: int64 [sequences, seq_len], the same on every rank.
        embedding: [vocab, hidden], in the source's dtype.
        dims: The rank grid.
        rank: This rank.
        layers: Number of layers.
        micro_batch: Sequences per forward call.
        dtype: Compute dtype.
        device: Where the layers run.
        modes: Of serving.
        backend: Name of what quantizes inputs and sums up.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        embedding: torch.Tensor,
        dims: ParallelDims,
        rank: int,
        *,
        layers: int,
        micro_batch: int,
        dtype: torch.dtype,
        device: torch.device,
        modes: Sequence[ServingMode],
        backend: str,
    ) -> None:
        store = HiddenStore(
            token_ids, embedding, dims, rank, micro_batch=micro_batch, dtype=dtype, device=device
        )
        self._begin(Bf16Stream(store, backend), layers, tuple(modes), backend)

    def beside(self) -> Streams:
        """Other streams of the same text before the first layer, with the same BF16 stream.

        `bf16` and `end_layer` are to be called of one of them.
        """
        other = object.__new__(Streams)
        other._begin(self._bf16, len(self._sums), self.modes, self.backend)
        return other

    def _begin(
        self, bf16: Bf16Stream, layers: int, modes: tuple[ServingMode, ...], backend: str
    ) -> None:
        self._bf16, self.modes, self.backend = bf16, modes, backend
        device = self.store.device
        self.served = {mode: [batch.hidden.clone() for batch in self.batches] for mode in modes}
        self._is_whole = [bool((batch.weights == 1).all()) for batch in self.batches]
        # By layer and mode: squared difference accumulated, and alone; then squared BF16 norm.
        self._sums = torch.zeros(layers, len(modes), 3, dtype=torch.float64, device=device)
        shape = (len(modes), layers, len(TAPS), 2)
        self._counts = torch.zeros(shape, dtype=torch.float64, device=device)
        # The modes hardly differ in it, so one of them looks.
        self._reach = torch.zeros(layers, len(TAPS), dtype=torch.float32, device=device)

    @property
    def store(self) -> HiddenStore:
        """Of the BF16 stream."""
        return self._bf16.store

    @property
    def batches(self) -> list[MicroBatch]:
        """The BF16 stream."""
        return self.store.batches

    def bf16(self, slot: LayerSlot) -> None:
        """Moves the BF16 stream through the layer that the slot holds, and keeps its input."""
        self._bf16.move(slot)

    @torch.inference_mode()
    def quantized(
        self,
        layer: int,
        mode: ServingMode,
        slot: LayerSlot,
        scales: LayerScales,
        *,
        is_bf16: bool = False,
        is_same: bool = False,
    ) -> None:
        """Moves a mode's stream through the layer, and the BF16 stream's input through it alone.

        Modes take turns in the order of `modes`. What is known of the layer alone is not computed.

        Args:
            layer: Its index.
            mode: Of serving.
            slot: Holds the weights of that mode.
            scales: Of the layer's inputs.
            is_bf16: The layer computes what it did for the BF16 stream: nothing is quantized.
            is_same: It computes the same in all modes.
        """
        index, device = self.modes.index(mode), self.store.device
        plain = InputQuantizer(scales, mode, device, self.backend)
        counting = InputQuantizer(
            scales,
            mode,
            device,
            self.backend,
            counts=self._counts[index, layer],
            reach=None if index else self._reach[layer],
        )
        sums, stream = self._sums[layer, index], self.served[mode]
        is_known = is_bf16 or (is_same and index > 0)
        for number, batch in enumerate(self.batches):
            # What repeats a sequence of another rank is not counted.
            quantizer = counting if self._is_whole[number] else plain
            stream[number] = slot.forward(stream[number], quantizer=quantizer)
            sums[0] += sum_squares(stream[number], batch.weights, self.backend, batch.hidden)
            if not is_known:
                alone = slot.forward(self._bf16.before[number].clone(), quantizer=plain)
                sums[1] += sum_squares(alone, batch.weights, self.backend, batch.hidden)
        if is_known:
            sums[1] = self._sums[layer, 0, 1]
        sums[2] = self._bf16.squares

    def end_layer(self) -> None:
        """Lets go of the BF16 stream's input."""
        self._bf16.before = []

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next layer changes, where it lies."""
        found = {f"bf16.{name}": hidden for name, hidden in self.store.state().items()}
        for mode in self.modes:
            for number, hidden in enumerate(self.served[mode]):
                found[f"{mode.value}.{number:05d}"] = hidden
        return {**found, "sums": self._sums, "counts": self._counts, "reach": self._reach}

    @torch.inference_mode()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over `state()` of streams of the same text."""
        for name, mine in self.state().items():
            mine.copy_(same_shape(state[name], mine))

    def errors(self, ranks: Ranks) -> list[Mapping[ServingMode, tuple[float, float]]]:
        """Relative errors of each layer by mode, accumulated and alone; a collective."""
        sums = reduce_sum(self._sums, ranks.world)
        relative = (sums[..., :2] / sums[..., 2:]).sqrt().tolist()
        return [
            {mode: (pair[0], pair[1]) for mode, pair in zip(self.modes, row, strict=True)}
            for row in relative
        ]

    def clipped(self, ranks: Ranks) -> dict[ServingMode, float]:
        """Share of quantized inputs beyond the calibrated amax, by mode; a collective.

        Counted in micro-batches without padding.
        """
        counts = reduce_sum(self._counts, ranks.world).sum((1, 2)).tolist()
        return {
            mode: beyond / elements if elements else 0.0
            for mode, (elements, beyond) in zip(self.modes, counts, strict=True)
        }

    def input_ranges(self, ranks: Ranks) -> list[InputRange]:
        """How every quantized input fits its calibrated range; a collective, counted likewise."""
        reach = reduce_max(self._reach, ranks.world).tolist()
        counts = reduce_sum(self._counts, ranks.world)
        shares = counts[..., 1] / counts[..., 0]
        return [
            InputRange(
                layer=layer,
                tap=TAPS[tap],
                clipped={
                    mode.value: float(shares[index, layer, tap])
                    for index, mode in enumerate(self.modes)
                    if counts[index, layer, tap, 0]
                },
                reach=reach[layer][tap],
            )
            for layer, tap in counts[..., 0].sum(0).nonzero().tolist()
        ]
