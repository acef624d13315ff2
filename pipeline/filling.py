"""Filling slots ahead of the forward pass: a thread of its own, a stream of its own.

In: the layers in the order of the visit, the slots, and a feed that knows where weights come from.
Out: filled slots. While one layer computes, the next one's weights go into its slot; a slot is
refilled only after the layer that it holds has been computed and packed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Protocol

import torch

from pipeline.architecture import LayerType, TensorSpec
from pipeline.checkpoint.read_ahead import ReadAhead
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES
from pipeline.checkpoint.synthetic import SyntheticSource
from pipeline.runtime.lanes import Lane, Mark
from pipeline.schedule import LayerSchedule
from pipeline.sharding import Shard
from pipeline.weights import Buffers, Loadable

Request = tuple[TensorSpec, str, Shard]
"""A tensor, its name in the source, and this rank's part of it."""


class Feed(Protocol):
    """Where weights come from."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far; made-up weights count nothing."""

    def fill(self, target: Loadable, requests: Sequence[Request]) -> None:
        """Loads one layer's tensors, on the current stream; layers come in order."""

    def close(self) -> None:
        """Stops what runs in the background."""


class FileFeed:
    """Weights read ahead from files into host buffers, then copied to the device.

    Args:
        ahead: Reads in the order of the visit.
        cast: Round F16 and F32 weights of linears to BF16 first.
        device: Where the slots are.
    """

    def __init__(self, ahead: ReadAhead, *, cast: bool, device: torch.device) -> None:
        self._ahead, self._cast, self._device = ahead, cast, device

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._ahead.bytes_read

    def fill(self, target: Loadable, requests: Sequence[Request]) -> None:
        """Loads one layer's tensors as they arrive."""
        for item in self._ahead.layer():
            tensor = item.tensor
            if self._cast and item.spec.is_linear_weight:
                tensor = tensor.bfloat16()
            target.load(item.spec, item.shard, tensor)
            item.release(Mark(self._device).synchronize)

    def close(self) -> None:
        """Stops reading."""
        self._ahead.close()


class SyntheticFeed:
    """Weights made where they are needed."""

    def __init__(self, source: SyntheticSource) -> None:
        self._source = source
        self.bytes_read = 0

    def fill(self, target: Loadable, requests: Sequence[Request]) -> None:
        """Makes one layer's tensors in place."""
        targets = [
            target.target_of(spec, TORCH_DTYPES[self._source.info(name).dtype])
            for spec, name, _ in requests
        ]
        self._source.fill_all(
            (name, shard, tensor)
            for (_, name, shard), tensor in zip(requests, targets, strict=True)
        )
        for (spec, _, shard), tensor in zip(requests, targets, strict=True):
            target.load(spec, shard, tensor)

    def close(self) -> None:
        """Nothing runs in the background."""


class SlotFiller:
    """Fills the slots in the order of the visit; a context manager.

    Args:
        visited: Layers to come.
        requests: What this rank needs of each.
        slots: By layer type.
        feed: Where weights come from.
        device: Where the slots are.
    """

    def __init__(
        self,
        visited: Sequence[LayerSchedule],
        requests: Sequence[Sequence[Request]],
        slots: Mapping[LayerType, Loadable],
        feed: Feed,
        device: torch.device,
    ) -> None:
        self._visited, self._requests = visited, requests
        self._slots, self._feed, self._device = slots, feed, device
        self._lane = Lane(device)
        self._lock = threading.Condition()
        # What the slots' memory was used for before must have ended, too.
        made = Mark(device)
        self._free: dict[LayerType, list[Mark] | None] = {kind: [made] for kind in slots}
        self._filled: list[Future[Mark]] = [Future() for _ in visited]
        self._taken, self._stopped = 0, False
        self._thread = threading.Thread(target=self._run, name="fill", daemon=True)
        self.bytes_by_layer: list[int] = []

    def __enter__(self) -> SlotFiller:
        """Starts with the first layer."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops; a fill in progress ends first."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        self._feed.close()
        self._thread.join()

    def slot(self, layer_type: LayerType) -> Loadable:
        """What layers of a type are loaded into."""
        return self._slots[layer_type]

    def take(self) -> tuple[float, int]:
        """Waits for the next layer's weights to be on their way, and orders this stream after them.

        Returns:
            Seconds that the calling thread waited, and bytes read for this layer.

        Raises:
            SourceError: A tensor could not be read.
        """
        index, self._taken = self._taken, self._taken + 1
        start = time.monotonic()
        mark = self._filled[index].result()
        mark.block_stream()
        return time.monotonic() - start, self.bytes_by_layer[index]

    def release(self, layer_type: LayerType, marks: list[Mark]) -> None:
        """The slot may be refilled once these marks have passed."""
        with self._lock:
            self._free[layer_type] = marks
            self._lock.notify_all()

    def _run(self) -> None:
        read = 0
        for index, schedule in enumerate(self._visited):
            try:
                marks = self._wait_for_slot(schedule.layer_type)
                if marks is None:
                    return
                mark = self._fill(schedule, self._requests[index], marks)
            except BaseException as error:
                self._filled[index].set_exception(error)
                return
            self.bytes_by_layer.append(self._feed.bytes_read - read)
            read = self._feed.bytes_read
            self._filled[index].set_result(mark)

    def _wait_for_slot(self, kind: LayerType) -> list[Mark] | None:
        with self._lock:
            while self._free[kind] is None and not self._stopped:
                self._lock.wait()
            marks, self._free[kind] = self._free[kind], None
        return None if self._stopped else marks

    def _fill(
        self, schedule: LayerSchedule, requests: Sequence[Request], marks: list[Mark]
    ) -> Mark:
        slot = self._slots[schedule.layer_type]
        if isinstance(slot, Buffers):
            slot.expect((spec, shard) for spec, _, shard in requests)
        with torch.inference_mode(), self._lane.use():
            for mark in marks:
                mark.block_stream()
            slot.begin_fill(schedule.layer)
            self._feed.fill(slot, requests)
            slot.end_fill()
            return Mark(self._device)
