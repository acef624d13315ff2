from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.checkpoint.source import Source, open_source
from pipeline.checkpoint.source_check import SourceCheck, check_source
from pipeline.errors import SourceError
from tests.unit.checkpoint.tiny import tiny_config, tiny_tensors, write_source

GATE = "backbone.layers.1.mixer.gate.weight"
UP = "backbone.layers.1.mixer.experts.0.up_proj.weight"


def check(
    directory: Path,
    change: Any = None,
    *,
    config: dict[str, Any] | None = None,
    cast: bool = False,
) -> SourceCheck:
    tensors = tiny_tensors(tiny_config())
    if change:
        change(tensors)
    opened = open_source(write_source(directory, config or tiny_config(), tensors))
    return check_source(opened, Architecture.from_hf_config(opened.config), cast=cast)


def test_accepts_the_tiny_source(source: Source) -> None:
    architecture = Architecture.from_hf_config(source.config)
    found = check_source(source, architecture, cast=False)
    assert {found.source_name(spec) for spec in found.specs} | set(found.mtp) == set(source.tensors)
    assert len(found.mtp) > 0


def test_embedding_of_transformers_5(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    found = check(tmp_path, rename)
    assert found.embedding_name == "backbone.embedding.weight"
    assert found.source_name(found.specs[0]) == "backbone.embedding.weight"


def test_counts_all_missing_extra_and_misshapen(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name][:7]:
            del tensors[name]
        tensors["backbone.layers.99.norm.weight"] = torch.zeros(4).bfloat16()
        tensors[GATE] = torch.zeros(3, 64)

    with pytest.raises(SourceError) as caught:
        check(tmp_path, spoil)
    text = str(caught.value)
    assert "7 missing (backbone.layers.1.mixer.experts.0.up_proj.weight" in text
    assert "and 2 more" in text
    assert "1 extra (backbone.layers.99.norm.weight)" in text
    assert f"1 misshapen ({GATE} [3, 64] instead of [2, 64])" in text


def test_missing_mtp(tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    with pytest.raises(SourceError, match="num_nextn_predict_layers=1"):
        check(tmp_path / "a", drop)
    config = tiny_config(num_nextn_predict_layers=0)
    assert check(tmp_path / "b", drop, config=config).mtp == ()


def test_head_beside_tied_embeddings(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    with pytest.raises(SourceError, match=r"lm_head.weight: found present, while config.json says"):
        check(tmp_path / "a", config=config)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]

    check(tmp_path / "b", drop, config=config)


@pytest.mark.parametrize(
    ("change", "config", "sign"),
    [
        (None, {"quantization_config": {"quant_method": "modelopt"}}, "has quantization_config"),
        (None, {"compression_config": {"a": 1}}, "has compression_config"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), {}, f"8-bit, the first {UP}"),
        (lambda t: t.update({UP: t[UP].to(torch.uint8)}), {}, "1 tensors are 8-bit"),
        (lambda t: t.update({f"{UP}_scale": torch.ones(())}), {}, "1 tensors are scales"),
    ],
)
def test_already_quantized(tmp_path: Path, change: Any, config: dict[str, Any], sign: str) -> None:
    with pytest.raises(SourceError, match="already quantized") as caught:
        check(tmp_path, change, config=tiny_config(**config))
    assert sign in str(caught.value)


def test_hf_quant_config_is_a_sign_too(tmp_path: Path) -> None:
    tmp_path.joinpath("hf_quant_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"hf_quant_config.json exists"):
        check(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_only_with_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    with pytest.raises(SourceError, match="say cast=true"):
        check(tmp_path / "a", change)
    check(tmp_path / "b", change, cast=True)


def test_copied_tensors_may_be_f32(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" in name or name.startswith("mtp."):
                tensors[name] = tensors[name].float()

    check(tmp_path, change)


def test_dtype_that_no_cast_helps(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP].double()

    with pytest.raises(SourceError, match=r"F64.*point checkpoint= at the BF16 model"):
        check(tmp_path, change, cast=True)
