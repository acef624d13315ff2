"""Registered host memory: copies from the device do not block, and nothing stays locked."""

import gc

import pytest
import torch

from pipeline.checkpoint.staging import StagingRing
from pipeline.runtime.pinned import host_memory

pytestmark = pytest.mark.gpu


def test_registered_memory_is_pinned() -> None:
    for nbytes in (4096, 3 * 2**20 + 5):
        memory = host_memory(nbytes, pinned=True)
        assert memory.is_pinned()
        source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device="cuda")
        memory.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(memory, source.cpu())
        del memory
        gc.collect()


def test_a_copy_out_does_not_wait_for_the_queue() -> None:
    ring = StagingRing(2**24, pinned=True)
    x = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        x = (x @ x).clamp_(-1, 1)
    place = ring.acquire(2**24)
    place.memory.view(torch.float32).view(-1)[: 2**22].copy_(x.view(-1)[: 2**22], non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert not done.query(), "the copy blocked until the products were done"
    done.synchronize()
    assert torch.equal(place.memory.view(torch.float32), x.view(-1)[: 2**22].cpu())
