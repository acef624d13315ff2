"""What is replaced for GPUs is put back."""

import torch
from megatron.core.ssm import mamba_mixer

from pipeline.mcore import gpu


def test_replacements_are_idempotent_and_removable() -> None:
    norm, has_mamba_ssm = mamba_mixer.ExtendedRMSNorm, mamba_mixer.HAVE_MAMBA_SSM
    allowed = torch.backends.cudnn.allow_tf32
    gpu.install()
    gpu.install()
    assert mamba_mixer.HAVE_MAMBA_SSM
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    gpu.remove()
    gpu.remove()
    assert mamba_mixer.ExtendedRMSNorm is norm
    assert has_mamba_ssm == mamba_mixer.HAVE_MAMBA_SSM
    assert torch.backends.cudnn.allow_tf32 == allowed
