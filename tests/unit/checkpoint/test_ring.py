import random
from collections import deque

from pipeline.checkpoint.ring import ALIGNMENT, Ring, aligned


def test_places_never_overlap_and_never_leave_the_buffer() -> None:
    generator = random.Random(0)
    ring = Ring(16 * ALIGNMENT)
    live: deque[tuple[int, int]] = deque()
    wraps = 0
    for _ in range(5000):
        nbytes = generator.choice([0, 1, 100, 511, 512, 513, 3000, 5000, ring.size])
        while (start := ring.take(nbytes)) is None:
            assert live, "an empty ring refused a size that fits"
            ring.give_back()
            live.popleft()
        stop = start + aligned(nbytes)
        assert start % ALIGNMENT == 0
        assert stop <= ring.size
        assert all(stop <= a or start >= b or a == b or start == stop for a, b in live)
        wraps += bool(live) and start < live[-1][0]
        live.append((start, stop))
    assert wraps > 100


def test_an_empty_ring_takes_its_whole_size_wherever_it_stood() -> None:
    ring = Ring(4 * ALIGNMENT)
    assert ring.take(ALIGNMENT) == 0
    assert ring.take(ring.size) is None
    ring.give_back()
    assert ring.take(ring.size) == 0
    assert ring.take(1) is None
    assert ring.take(0) == 0  # nothing needs no room
