"""Work beside the main stream: CUDA streams where there are any, plain order on a CPU.

In: a device. Out: lanes to enqueue work on, and marks to wait for. On a CPU everything has already
happened when a call returns, so lanes and marks do nothing but tell the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Mark:
    """A point in the order of a lane's work; made by `mark`."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            # (blocking: a thread that waits for it sleeps.)
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._time = time.monotonic()

    def synchronize(self) -> None:
        """Blocks the calling thread until everything before the mark is done."""
        if self._event is not None:
            self._event.synchronize()

    def block_stream(self) -> None:
        """What the current stream is given from now on starts after the mark."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream())

    def seconds_until(self, later: Mark) -> float:
        """Seconds from here to a later mark, on the device's clock; both must have passed."""
        if self._event is not None and later._event is not None:
            return float(self._event.elapsed_time(later._event)) / 1e3
        return later._time - self._time


class Lane:
    """A stream of its own on a GPU.

    Args:
        device: Where it runs.
        urgent: Its kernels go first where both wait for room.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1 if urgent else 0)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Enqueues what is inside on this lane."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield


class HostCopy:
    """A small tensor on its way to the host, from the current stream.

    Args:
        tensor: On any device; may be changed once the copy has been made (CPU tensors are cloned).
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
        else:
            self._tensor = tensor.clone()
        self._copied = Mark(tensor.device)

    def get(self) -> torch.Tensor:
        """The CPU tensor, once it is there."""
        self._copied.synchronize()
        return self._tensor
