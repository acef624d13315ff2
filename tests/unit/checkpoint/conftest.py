"""The tiny source and its exports, made once; tests that break something take a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.architecture import Architecture
from pipeline.checkpoint.source import Source, open_source
from tests.unit.checkpoint.tiny import (
    NVFP4,
    export,
    mixed_formats,
    tiny_config,
    tiny_tensors,
    write_source,
)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    config = tiny_config()
    directory = tmp_path_factory.mktemp("tiny") / "source"
    return open_source(write_source(directory, config, tiny_tensors(config), shards=3))


@pytest.fixture(scope="session")
def mixed_export(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    formats = mixed_formats(Architecture.from_hf_config(source.config))
    return export(source, tmp_path_factory.mktemp("mixed") / "out", formats)


@pytest.fixture(scope="session")
def flat_export(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    formats = mixed_formats(Architecture.from_hf_config(source.config))
    experts = {module: NVFP4 for module in formats if ".experts." in module}
    return export(source, tmp_path_factory.mktemp("flat") / "out", experts, kv_cache_fp8=False)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / "copy"))

    return copy
