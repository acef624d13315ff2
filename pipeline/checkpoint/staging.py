"""A ring of host memory for packed tensors on their way from a device to files.

In: sizes. Out: places in page-locked memory, that come back when their bytes are written.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch

from pipeline.checkpoint.ring import ALIGNMENT, Ring, aligned
from pipeline.runtime.pinned import host_memory


class Place:
    """A piece of a `StagingRing`.

    Attributes:
        memory: uint8 [nbytes], of unknown content.
    """

    def __init__(self, memory: torch.Tensor, ring: StagingRing) -> None:
        self.memory, self._ring = memory, ring
        self.is_released = False

    def release(self) -> None:
        """Gives the memory back; from any thread, once."""
        self._ring.release(self)


def _allocate(nbytes: int, device: int | None) -> torch.Tensor:
    """Host memory, locked for a device: a thread of its own would be on the first one."""
    with nullcontext() if device is None else torch.cuda.device(device):
        return host_memory(nbytes, pinned=device is not None)


class StagingRing:
    """Host memory for packed tensors on their way to files; threads may share it.

    Places may be released in any order; their memory is used again in the order of taking. Locking
    the pages takes seconds: a thread does it, and the first to ask for a place waits for it.

    Args:
        nbytes: Size of all of it.
        pinned: Whether it is page-locked.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        size = max(aligned(nbytes), ALIGNMENT)
        allocator = ThreadPoolExecutor(1, "staging")
        device = torch.cuda.current_device() if pinned else None
        self._memory = allocator.submit(_allocate, size, device)
        allocator.shutdown(wait=False)
        self._ring = Ring(size)
        self._taken: deque[Place] = deque()
        self._changed = threading.Condition()
        self.waited_s = 0.0

    def acquire(self, nbytes: int) -> Place:
        """A place of `nbytes`, at most the ring's size; waits until there is room.

        `waited_s` grows by the time spent here.
        """
        start = time.monotonic()
        memory = self._memory.result()
        with self._changed:
            while (offset := self._ring.take(nbytes)) is None:
                self._changed.wait()
            self.waited_s += time.monotonic() - start
            place = Place(memory[offset : offset + nbytes], self)
            self._taken.append(place)
            return place

    def release(self, place: Place) -> None:
        """Gives a place back."""
        with self._changed:
            assert not place.is_released
            place.is_released = True
            while self._taken and self._taken[0].is_released:
                self._taken.popleft()
                self._ring.give_back()
            self._changed.notify_all()
