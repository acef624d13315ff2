import threading
import time

import pytest
import torch

from pipeline.checkpoint.host_buffers import HostBuffers


def test_buffers_are_lent_once_at_a_time() -> None:
    buffers = HostBuffers(1000, 2)
    one, other = buffers.acquire(), buffers.acquire()
    assert one.dtype == torch.uint8
    assert one.shape == other.shape == (1000,)
    assert one.data_ptr() != other.data_ptr()
    buffers.release(one)
    assert buffers.acquire().data_ptr() == one.data_ptr()
    assert buffers.waited_s < 0.1


def test_acquire_waits_for_a_release_and_counts_the_time() -> None:
    buffers = HostBuffers(10, 1)
    buffer = buffers.acquire()
    timer = threading.Timer(0.1, buffers.release, [buffer])
    timer.start()
    buffers.acquire()
    assert 0.05 < buffers.waited_s < 5


def test_a_buffer_is_released_once() -> None:
    buffers = HostBuffers(10, 1)
    buffer = buffers.acquire()
    buffers.release(buffer)
    with pytest.raises(KeyError):
        buffers.release(buffer)


def test_many_threads_share_few_buffers() -> None:
    buffers = HostBuffers(8, 3)
    clashes: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            buffer = buffers.acquire()
            buffer.fill_(number)
            time.sleep(0)
            if not bool((buffer == number).all()):
                clashes.append(number)
            buffers.release(buffer)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert clashes == []
