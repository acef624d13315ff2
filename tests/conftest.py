"""What every test may rely on: one thread per process, no network, and gpu tests only with a GPU.

The variables are set before anything imports torch, transformers or datasets; the ranks that
tests start inherit them.
"""

import os

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",  # ranks share few cores; also keeps forked ranks free of OpenMP threads
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    # Lets torch.cuda.is_available ask NVML: a CUDA context in this process would forbid forking.
    PYTORCH_NVML_BASED_CUDA_CHECK="1",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
