"""What is replaced for GPUs is put back, and fp32 scans never meet the TF32 kernel."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.mcore import gpu


@pytest.fixture
def kernel_dtypes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Dtypes that reach the kernel, which is played by a function."""
    dtypes: list[torch.dtype] = []

    def kernel(x: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        dtypes.append(x.dtype)
        return x

    monkeypatch.setattr(gpu.mamba_mixer, "mamba_chunk_scan_combined", kernel)
    yield dtypes
    gpu.remove()


def test_replacements_are_idempotent_and_removable(kernel_dtypes: list[torch.dtype]) -> None:
    before = gpu.mamba_mixer.mamba_chunk_scan_combined
    allowed = torch.backends.cudnn.allow_tf32
    gpu.install()
    gpu.install()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    gpu.remove()
    gpu.remove()
    assert gpu.mamba_mixer.mamba_chunk_scan_combined is before
    assert torch.backends.cudnn.allow_tf32 == allowed


def test_only_other_dtypes_than_fp32_reach_the_kernel(kernel_dtypes: list[torch.dtype]) -> None:
    gpu.install()
    for dtype in (torch.float32, torch.bfloat16):
        x, B = torch.ones(1, 4, 2, 4, dtype=dtype), torch.ones(1, 4, 1, 3, dtype=dtype)
        dt, A = torch.ones(1, 4, 2, dtype=dtype), -torch.ones(2)
        gpu.mamba_mixer.mamba_chunk_scan_combined(x, dt, A, B, B, 4, state_dtype=None)
    assert kernel_dtypes == [torch.bfloat16]
