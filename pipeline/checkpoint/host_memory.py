"""Host memory that a GPU copies from and to without blocking, and a ring of it for what goes out.

In: sizes. Out: uint8 tensors, page-locked where asked. torch's own pinned memory is rounded up to a
power of two, which for a layer of tens of gigabytes wastes as much again; here ordinary memory is
registered with CUDA instead.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque

import torch

from pipeline.checkpoint.ring import ALIGNMENT, Ring, aligned


def host_memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    """A uint8 tensor [nbytes] on the host; page-locked for as long as the tensor itself lives.

    Args:
        nbytes: Size.
        pinned: Whether it is page-locked (needs a CUDA device).
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if pinned and nbytes:
        memory.zero_()  # touches the pages
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), nbytes, 0)))
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
    return memory


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


class StagingRing:
    """Host memory for packed tensors on their way to files; threads may share it.

    Places may be released in any order; their memory is used again in the order of taking.

    Args:
        nbytes: Size of all of it.
        pinned: Whether it is page-locked.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        size = max(aligned(nbytes), ALIGNMENT)
        self._memory = host_memory(size, pinned=pinned)
        self._ring = Ring(size)
        self._taken: deque[Place] = deque()
        self._changed = threading.Condition()
        self.waited_s = 0.0

    def acquire(self, nbytes: int) -> Place:
        """A place of `nbytes`, at most the ring's size; waits until there is room.

        `waited_s` grows by the time spent here.
        """
        start = time.monotonic()
        with self._changed:
            while (offset := self._ring.take(nbytes)) is None:
                self._changed.wait()
            self.waited_s += time.monotonic() - start
            place = Place(self._memory[offset : offset + nbytes], self)
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
