"""Host memory that a GPU copies from and to without blocking.

In: a size. Out: a uint8 tensor, page-locked where asked. torch's own pinned memory is rounded up to
a power of two, which for tens of gigabytes wastes as much again; here ordinary memory is registered
with CUDA instead.
"""

from __future__ import annotations

import weakref

import torch


def host_memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    """A uint8 tensor [nbytes] on the host; page-locked for as long as its memory is in use.

    Args:
        nbytes: Size.
        pinned: Whether it is page-locked (needs a CUDA device).
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if pinned and nbytes:
        memory.zero_()  # touches the pages
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), nbytes, 0)))
        # Views keep the storage, not this tensor object.
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
    return memory
