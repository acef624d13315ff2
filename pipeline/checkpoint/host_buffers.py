"""A few host buffers that are used again and again: for copied tensors on their way to a file."""

from __future__ import annotations

import threading
import time

import torch


class HostBuffers:
    """A pool of buffers of one size; threads may share it.

    Args:
        nbytes: Size of each.
        count: Number of buffers.
    """

    def __init__(self, nbytes: int, count: int) -> None:
        self.nbytes = nbytes
        self._free = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(count)]
        self._lent: set[int] = set()
        self._changed = threading.Condition()
        self.waited_s = 0.0

    def acquire(self) -> torch.Tensor:
        """A buffer, uint8 `[nbytes]`, of unknown content; waits until one is free.

        `waited_s` grows by the time spent here, over all threads.
        """
        start = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            self.waited_s += time.monotonic() - start
            buffer = self._free.pop()
            self._lent.add(buffer.data_ptr())
            return buffer

    def release(self, buffer: torch.Tensor) -> None:
        """Takes a buffer back: the tensor that `acquire` gave, once."""
        with self._changed:
            self._lent.remove(buffer.data_ptr())
            self._free.append(buffer)
            self._changed.notify()
