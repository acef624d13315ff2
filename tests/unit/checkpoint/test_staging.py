"""The staging ring: room in order, released in any order, waited for when it is full."""

import random
import threading
import time

import pytest

from pipeline.checkpoint.staging import StagingRing
from pipeline.runtime.pinned import host_memory


def test_memory_is_as_large_as_asked() -> None:
    assert host_memory(1000, pinned=False).shape == (1000,)


def test_places_do_not_overlap_and_are_used_again() -> None:
    ring = StagingRing(2048, pinned=False)
    first, second = ring.acquire(1000), ring.acquire(1024)
    first.memory.fill_(1)
    second.memory.fill_(2)
    assert first.memory.unique().tolist() == [1]
    assert first.memory.shape == (1000,)
    first.release()
    assert ring.acquire(512).memory.data_ptr() == first.memory.data_ptr()
    with pytest.raises(AssertionError):
        first.release()


def test_acquire_waits_for_the_oldest_place() -> None:
    ring = StagingRing(1024, pinned=False)
    first, second = ring.acquire(512), ring.acquire(512)
    second.release()  # younger: its memory comes after the first one's
    timer = threading.Timer(0.1, first.release)
    timer.start()
    ring.acquire(1024)
    assert 0.05 < ring.waited_s < 5


def test_a_writer_behind_a_fast_packer_loses_nothing() -> None:
    """Places of random sizes, given back by threads in another order, keep what was put there."""
    ring = StagingRing(8192, pinned=False)
    clashes: list[int] = []
    threads = []

    def write(place: object, value: int) -> None:
        time.sleep(random.random() / 500)
        if place.memory.unique().tolist() != [value]:  # type: ignore[attr-defined]
            clashes.append(value)
        place.release()  # type: ignore[attr-defined]

    for number in range(200):
        place = ring.acquire(random.randint(1, 3000))
        place.memory.fill_(number % 251)
        threads.append(threading.Thread(target=write, args=(place, number % 251)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert ring.acquire(8192).memory.shape == (8192,)
