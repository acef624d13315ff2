"""Room in a buffer that is used round and round: taken in order, given back in order.

In: sizes, one after the other. Out: where each of them lies. Arithmetic only; who may call when is
the caller's business (`read_ahead`).
"""

from __future__ import annotations

from collections import deque

ALIGNMENT = 512
"""Bytes that every place is a multiple of: enough for any dtype, and for copies to a device."""


def aligned(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Ring:
    """Places in a buffer of `size` bytes.

    Head and tail count bytes from the beginning of the run, so that head - tail is what is taken.
    A place is in one piece: what is left at the end of the buffer is skipped when it is too short.

    Args:
        size: A multiple of `ALIGNMENT`.
    """

    def __init__(self, size: int) -> None:
        assert size % ALIGNMENT == 0
        self.size = size
        self._head = self._tail = 0
        self._ends: deque[int] = deque()

    def take(self, nbytes: int) -> int | None:
        """First byte of a place, or None while there is no room; an empty ring has room for any."""
        nbytes = aligned(nbytes)
        assert nbytes <= self.size
        offset = self._head % self.size
        start = self._head if offset + nbytes <= self.size else self._head + self.size - offset
        if start + nbytes - self._tail > self.size:
            return None
        self._head = start + nbytes
        self._ends.append(self._head)
        return start % self.size

    def give_back(self) -> None:
        """Frees the oldest place."""
        self._tail = self._ends.popleft()
        if not self._ends:
            self._head = self._tail = 0  # nothing is left to skip
