"""Checkpoints that are refused before the sweep: tensors, files, config.json."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.errors import (
    ArchitectureError,
    SourceError,
)
from tests.e2e.harness import golden_config
from tests.e2e.models import (
    Files,
    edit_config,
    edit_tensors,
    write_checkpoint,
)
from tests.e2e.refusals import EXPERT, WEIGHT_ONLY, refuse

# --- the source's tensors and files


def test_missing_tensor(source: Path) -> None:
    edit_tensors(source, backbone__layers__3__mixer__up_proj__weight=None)
    refuse(
        SourceError,
        source,
        what=str(source),
        value="1 missing (backbone.layers.3.mixer.up_proj.weight)",
        rule="exactly those that config.json describes",
        remedy="fetch",
    )


def test_extra_tensor(source: Path) -> None:
    edit_tensors(source, backbone__layers__3__mixer__up_proj__bias=torch.zeros(64).bfloat16())
    refuse(
        SourceError,
        source,
        value="1 extra (backbone.layers.3.mixer.up_proj.bias)",
        rule="exactly those",
    )


def test_misshapen_tensor(source: Path) -> None:
    edit_tensors(source, backbone__norm_f__weight=torch.ones(63).bfloat16())
    refuse(
        SourceError,
        source,
        value="1 misshapen (backbone.norm_f.weight [63] instead of [64])",
        rule="exactly those",
    )


def test_layers_of_one_type_with_different_shapes(source: Path) -> None:
    names = [f"backbone.layers.5.mixer.experts.{e}" for e in range(8)]
    wide = {f"{name}.up_proj.weight": torch.zeros(48, 32).bfloat16() for name in names}
    wide |= {f"{name}.down_proj.weight": torch.zeros(32, 48).bfloat16() for name in names}
    edit_tensors(source, **wide)
    error = refuse(SourceError, source, value="16 misshapen", rule="exactly those")
    assert "backbone.layers.5.mixer.experts.0.up_proj.weight [48, 32] instead" in str(error)
    assert "and 11 more" in str(error)


def test_missing_extra_and_misshapen_are_counted_together(source: Path) -> None:
    edit_tensors(source, lm_head__weight=None, other=torch.zeros(1))
    refuse(SourceError, source, value="1 missing (lm_head.weight); 1 extra (other)")


def test_promised_mtp_block_is_absent(source: Path) -> None:
    edit_config(source, num_nextn_predict_layers=1)
    refuse(
        SourceError,
        source,
        what="mtp.*",
        rule="num_nextn_predict_layers=1",
        remedy="num_nextn_predict_layers to 0",
    )


def test_head_beside_tied_embeddings(source: Path) -> None:
    edit_config(source, tie_word_embeddings=True)
    refuse(SourceError, source, what="lm_head.weight", value="tie_word_embeddings=true")


def test_truncated_file(source: Path) -> None:
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    refuse(SourceError, source, what=str(path), value="bytes", rule="ends", remedy="fetch it again")


def test_truncated_shard_of_several(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Files(shards=3))
    path = source / "model-00002-of-00003.safetensors"
    os.truncate(path, 20)
    refuse(SourceError, source, what=str(path), value="20 bytes", rule="header", remedy="truncated")


@pytest.mark.parametrize(
    ("damage", "value"),
    [
        (lambda data: data[:8] + b"#" + data[9:], "a header that does not parse"),
        (lambda data: b"\xff" * 8 + data[8:], "with a header of 18446744073709551615 bytes"),
        (lambda data: data + b"tail", "bytes"),
        (lambda data: b"", "0 bytes"),
    ],
    ids=["json", "length", "tail", "empty"],
)
def test_corrupt_header(damage: Callable[[bytes], bytes], value: str, source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refuse(SourceError, source, what=str(path), value=value, remedy="again")


def test_missing_shard(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Files(shards=3))
    (source / "model-00002-of-00003.safetensors").unlink()
    refuse(
        SourceError,
        source,
        what="model.safetensors.index.json",
        value="model-00002-of-00003.safetensors",
        rule="must be in the directory",
        remedy="fetch the missing files",
    )


def test_missing_shard_without_index(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Files(shards=3, index=False))
    (source / "model-00002-of-00003.safetensors").unlink()
    refuse(SourceError, source, value="missing (", rule="exactly those")


def test_dangling_link_of_a_hub_cache(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hub", Files(in_hub_cache=True))
    (source / "model.safetensors").resolve().unlink()
    refuse(SourceError, source, what=str(source))


def test_tensor_in_two_files(source: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(96, 64).bfloat16()}, source / "other.safetensors")
    refuse(SourceError, source, what="lm_head.weight", value="other.safetensors", rule="one file")


def test_weights_that_are_not_safetensors(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuse(SourceError, source, value="no .safetensors file", remedy="save_pretrained")


def test_no_such_directory(tmp_path: Path) -> None:
    refuse(
        SourceError,
        tmp_path / "nowhere",
        what="nowhere",
        value="no such directory",
        rule="must be a directory",
    )


def test_already_quantized(source: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    config = golden_config(quantized, checkpoint=str(source), recipe=WEIGHT_ONLY)
    calibrate(config, CONF_DIR, Place(), "")
    error = refuse(
        SourceError,
        quantized,
        what=str(quantized),
        value="config.json has quantization_config",
        rule="original BF16 checkpoint",
        remedy="BF16 model",
    )
    assert "hf_quant_config.json exists" in str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["F32", "F16"])
def test_other_dtypes_without_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Files(dtype=dtype))
    refuse(
        SourceError,
        source,
        value=f"mixer.in_proj.weight {'F32' if dtype is torch.float32 else 'F16'}",
        rule="linear weights must be BF16",
        remedy="cast=true",
    )


def test_dtype_that_cast_does_not_help(source: Path) -> None:
    edit_tensors(source, backbone__layers__3__mixer__up_proj__weight=torch.zeros(64, 64).double())
    refuse(SourceError, source, cast=True, value="up_proj.weight F64", rule="must be BF16")


# --- config.json


@pytest.mark.parametrize(
    ("text", "value"),
    [("{", "invalid JSON"), ("[]", "list"), ("\xff", "invalid JSON"), ("{}", "None")],
)
def test_config_that_is_not_one(text: str, value: str, source: Path) -> None:
    (source / "config.json").write_bytes(text.encode("latin-1"))
    kind = ArchitectureError if text == "{}" else SourceError
    refuse(kind, source, what="config.json", value=value)


def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    refuse(SourceError, source, what="config.json", value="No such file")


@pytest.mark.parametrize(
    ("settings", "what", "value", "rule"),
    [
        ({"model_type": "llama"}, "model_type", "'llama'", "nemotron_h"),
        ({"hidden_size": None}, "hidden_size", "nothing", "need it"),
        ({"hidden_size": "64"}, "hidden_size", "'64'", "must be a positive int"),
        ({"num_hidden_layers": 5}, "num_hidden_layers", "5", "names 6 layers"),
        ({"hybrid_override_pattern": "MEXME"}, "hybrid_override_pattern", "'X'", "layer types are"),
        ({"hybrid_override_pattern": None}, "config.json", "neither", "type of every layer"),
        ({"layers_block_type": ["moe"]}, "config.json", "1 layers", "the same layers"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok", "9", "at most n_routed_experts=8"),
        ({"n_group": 3}, "n_group", "3", "must divide n_routed_experts=8"),
        ({"n_group": 4, "topk_group": 1}, "n_group", "(4, 1)", "must hold num_experts_per_tok=3"),
        ({"topk_method": "greedy"}, "topk_method", "'greedy'", "'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func", "'softmax'", "'sigmoid'"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax", "True", "False"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act", "'silu'", "'relu2'"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act", "'gelu'", "'silu'"),
        ({"sliding_window": 128}, "sliding_window", "128", "None"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit", "[0.001, 0.1]", "(0, inf)"),
        ({"num_key_value_heads": 3}, "num_attention_heads", "4", "num_key_value_heads=3"),
        ({"n_groups": 3}, "mamba_num_heads", "8", "multiple of n_groups=3"),
    ],
)
def test_config_that_cannot_be_used(
    settings: dict[str, Any], what: str, value: str, rule: str, source: Path
) -> None:
    edit_config(source, **settings)
    refuse(ArchitectureError, source, what=what, value=value, rule=rule)


def test_config_of_another_model(source: Path) -> None:
    edit_config(source, moe_intermediate_size=64)
    error = refuse(SourceError, source, value="32 misshapen", remedy="config.json")
    assert f"{EXPERT}.0.up_proj.weight [32, 32] instead of [64, 32]" in str(error)
