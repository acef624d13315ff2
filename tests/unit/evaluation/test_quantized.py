"""Reading a quantized directory: shards, values, scales, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture, expected_tensors
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.errors import AuditError, LayoutError, SourceError
from pipeline.evaluation.quantized import QuantizedCheckpoint, dequantize
from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.scales import InputScale
from pipeline.nvfp4.formats import Format
from pipeline.sharding import ParallelDims, Shard, shard_of
from tests.unit.checkpoint.tiny import (
    FP8,
    NVFP4,
    W4A16,
    edit_configs,
    edit_json,
    export,
    mixed_formats,
    rewrite,
    tiny_config,
    tiny_tensors,
    write_source,
)

CPU = torch.device("cpu")
W4A4_MODE, W4A16_MODE = ServingMode.w4a4, ServingMode.w4a16
EXPERT = "backbone.layers.1.mixer.experts.0.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    config = tiny_config(n_groups=2)
    directory = tmp_path_factory.mktemp("tiny") / "source"
    return open_source(write_source(directory, config, tiny_tensors(config)))


def formats_of(source: FileSource) -> Any:
    return mixed_formats(Architecture.from_hf_config(source.config))


@pytest.fixture(scope="module")
def mixed(source: FileSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, tmp_path_factory.mktemp("mixed") / "out", formats_of(source))


@pytest.fixture
def broken(mixed: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(mixed, tmp_path / "copy"))


def expected_values(source: FileSource, checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """Whole tensors, dequantized."""
    specs = expected_tensors(checkpoint.architecture)
    return {spec.name: (spec, checkpoint.read(spec, None, W4A4_MODE)) for spec in specs}


def test_values_are_the_sources_within_the_formats_error(source: FileSource, mixed: Path) -> None:
    checkpoint = QuantizedCheckpoint(mixed)
    seen = set()
    for name, (spec, value) in expected_values(source, checkpoint).items():
        original = source.read(name)
        algorithm = checkpoint.algorithm(spec)
        seen.add(algorithm)
        if algorithm is None:
            assert value.dtype is original.dtype
            assert torch.equal(value, original), name
            continue
        error = float((value - original.float()).norm() / original.float().norm())
        low, high = (0.07, 0.11) if algorithm == "NVFP4" else (0.02, 0.032)
        assert low < error < high, f"{name}: {error}"
    assert seen == {None, "NVFP4", "FP8"}


def cut(value: torch.Tensor, shard: Shard) -> torch.Tensor:
    if shard.is_whole:
        return value
    return torch.cat([value.narrow(shard.dim, a, b - a) for a, b in shard.ranges], shard.dim)


@pytest.mark.parametrize(
    "degrees",
    [{"tp": 2}, {"ep": 2}, {"etp": 2}, {"world": 4, "tp": 2, "ep": 2, "etp": 2}],
    ids=["tp2", "ep2", "etp2", "tp2-ep2-etp2"],
)
def test_shards_are_parts_of_the_whole(
    degrees: dict[str, int], source: FileSource, mixed: Path
) -> None:
    checkpoint = QuantizedCheckpoint(mixed)
    dims = ParallelDims(**{"world": 2, **degrees})
    cut_along_k = 0
    for rank in range(dims.world):
        checkpoint.check_layout(dims, rank)
        for name, (spec, whole) in expected_values(source, checkpoint).items():
            shard = shard_of(spec, checkpoint.architecture, dims, rank)
            if shard is None:
                continue
            part = checkpoint.read(spec, shard, W4A4_MODE)
            assert part.shape == shard.shape
            assert torch.equal(part, cut(whole, shard)), name
            cut_along_k += shard.dim == 1 and checkpoint.algorithm(spec) == "NVFP4"
    assert cut_along_k or not {"etp"} & set(degrees)


def test_degrees_that_cut_a_block_are_refused(source: FileSource, mixed: Path) -> None:
    with pytest.raises(LayoutError, match=r"experts\.0\.down_proj.*K=64 / etp=8 = 8"):
        QuantizedCheckpoint(mixed).check_layout(ParallelDims(world=8, etp=8), 0)


def test_hopper_flushes_small_block_scales_and_nothing_else(broken: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.weight_scale"].view(torch.uint8)[3, 1] = 0x07
        tensors[f"{EXPERT}.weight_scale"].view(torch.uint8)[5, 0] = 0x08

    rewrite(broken, shrink)
    checkpoint = QuantizedCheckpoint(broken)
    specs = {spec.name: spec for spec in expected_tensors(checkpoint.architecture)}
    stored = checkpoint.fetch(specs[f"{EXPERT}.weight"])
    other = checkpoint.fetch(specs[f"{EXPERT.replace('.0.', '.1.')}.weight"])
    assert stored.flushes
    assert not other.flushes
    full, flushed = (dequantize(stored, mode, CPU) for mode in (W4A4_MODE, W4A16_MODE))
    assert full[3, 16:32].abs().max() > 0
    assert full[5, :16].abs().max() > 0
    full[3, 16:32] = 0.0
    assert torch.equal(full, flushed)


def test_scales_by_tap_name(source: FileSource, broken: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.input_scale"].fill_(0.5)
        tensors["backbone.layers.0.mixer.out_proj.input_scale"].fill_(0.25)
        tensors["backbone.layers.3.mixer.v_proj.v_scale"].fill_(3.0)

    rewrite(broken, change)
    checkpoint = QuantizedCheckpoint(broken)
    small = torch.tensor(0.01).item()
    fp8, nvfp4 = InputScale(Format.fp8, small), InputScale(Format.nvfp4, small)
    assert checkpoint.layer_scales(0) == {
        "in_proj": fp8,
        "out_proj": InputScale(Format.fp8, 0.25),
    }
    assert checkpoint.notes() == []
    assert checkpoint.layer_scales(1) == {
        "shared_experts.up_proj": fp8,
        "shared_experts.down_proj": fp8,
        "experts.up_proj": InputScale(Format.nvfp4, 0.5),
        "experts.down_proj": nvfp4,
    }
    assert checkpoint.layer_scales(3) == {
        "qkv": nvfp4,
        "k_cache": InputScale(Format.fp8, 1.0),
        "v_cache": InputScale(Format.fp8, 3.0),
    }
    assert checkpoint.layer_scales(6) == {}
    (note,) = checkpoint.notes()
    assert "1 layers (first: layer 1 experts.up_proj, 0.01 to 0.5); the largest counts" in note


@pytest.mark.parametrize(
    ("pair", "algorithm", "scaled"),
    [(NVFP4, "NVFP4", True), (W4A16, "W4A16_NVFP4", False), (FP8, "FP8", True)],
)
def test_flat_spelling(
    pair: Any, algorithm: str, scaled: bool, source: FileSource, tmp_path: Path
) -> None:
    experts = {module: pair for module in formats_of(source) if ".experts." in module}
    directory = export(source, tmp_path / "flat", experts, kv_cache_fp8=False)
    config = json.loads((directory / "config.json").read_text())
    assert "quantized_layers" not in config["quantization_config"]
    checkpoint = QuantizedCheckpoint(directory)
    assert set(checkpoint.algorithms) == set(experts)
    assert set(checkpoint.algorithms.values()) == {algorithm}
    taps = {"experts.up_proj", "experts.down_proj"}
    assert set(checkpoint.layer_scales(1)) == (taps if scaled else set())
    assert checkpoint.layer_scales(0) == checkpoint.layer_scales(3) == {}
    assert dict(checkpoint.layer_algorithms(1)) == dict.fromkeys(taps, algorithm)


def test_the_other_name_of_the_embedding(source: FileSource, broken: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    rewrite(broken, rename)
    edit_configs(broken, lambda layers, ignore: ignore.append("backbone.embedding"))
    checkpoint = QuantizedCheckpoint(broken)
    spec = expected_tensors(checkpoint.architecture)[0]
    assert torch.equal(checkpoint.read(spec, None, W4A4_MODE), source.read(spec.name))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no quantization": (
        lambda d: edit_json(d / "config.json", lambda v: v.pop("quantization_config")),
        "config.json has no quantization_config",
    ),
    "broken names": (
        lambda d: edit_configs(d, lambda layers, ignore: ignore.append("x.\0pt_name_sentinel")),
        "1 broken names in ignore",
    ),
    "a missing tensor": (
        lambda d: rewrite(d, lambda tensors: tensors.pop(f"{EXPERT}.weight_scale_2")),
        f"{EXPERT}.weight_scale_2 is missing",
    ),
    "unequal scales of q, k and v": (
        lambda d: rewrite(
            d, lambda t: t["backbone.layers.3.mixer.k_proj.weight_scale_2"].mul_(1.5)
        ),
        "backbone.layers.3.mixer.qkv_proj: weight_scale_2 differs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_audit_refuses_is_refused(name: str, broken: Path) -> None:
    change, message = REFUSED[name]
    change(broken)
    with pytest.raises(AuditError) as caught:
        QuantizedCheckpoint(broken)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"quantization_config": []}], ids=["none", "malformed"])
def test_ranks_that_do_not_audit_raise_no_other_kind_of_error(
    config: dict[str, Any], broken: Path
) -> None:
    def replace(value: dict[str, Any]) -> None:
        del value["quantization_config"]
        value.update(config)

    edit_json(broken / "config.json", replace)
    with pytest.raises(AuditError):
        QuantizedCheckpoint(broken, audited=False)


def test_a_source_of_another_shape_is_refused(source: FileSource, mixed: Path) -> None:
    checkpoint = QuantizedCheckpoint(mixed)
    checkpoint.check_architecture(checkpoint.architecture, "here")
    without_mtp = tiny_config(n_groups=2, num_nextn_predict_layers=0)
    checkpoint.check_architecture(Architecture.from_hf_config(without_mtp), "here")
    other = Architecture.from_hf_config(tiny_config(n_groups=2, n_routed_experts=4))
    with pytest.raises(SourceError, match="n_routed_experts 2, source 4; must have the shape"):
        checkpoint.check_architecture(other, "there")
