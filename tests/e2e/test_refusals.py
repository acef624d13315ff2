"""Every refusal, end to end: what it says, and that nothing is left behind.

A refusal before the sweep is raised in this process, whatever the number of ranks: the check
comes before the ranks connect. Those in the sweep run on forked ranks.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.checkpoint.hub import DEMO_DIRECTORY
from pipeline.config import Device
from pipeline.errors import (
    ArchitectureError,
    ConfigError,
    DataError,
    LayersweepError,
    LayoutError,
    NumericsError,
    OutputError,
    RecipeError,
    SourceError,
)
from tests.distributed.helpers import RankError
from tests.e2e.harness import golden_config, read_checkpoint, run_job
from tests.e2e.models import (
    Files,
    digest_directory,
    edit_config,
    edit_tensors,
    write_checkpoint,
    write_token_ids,
)

ROOT = Path(__file__).parents[2]
EVERYTHING = "general/ptq/nvfp4_default-kv_fp8"
WEIGHT_ONLY = "nvfp4_weight_only"
SIZE = {"num_sequences": 4, "seq_len": 32, "loss_sequences": 1}
EXPERT = "backbone.layers.1.mixer.experts"


@pytest.fixture(autouse=True)
def _without_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plots take longer than these jobs, and have tests of their own."""
    monkeypatch.setattr("pipeline.publication.write_html", lambda report, path: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


def refuse(
    kind: type[LayersweepError],
    source: Path | str,
    *,
    world: int = 1,
    what: str = "",
    value: str = "",
    rule: str = "",
    remedy: str = "",
    **options: Any,
) -> LayersweepError:
    """Starts a job that must be refused before the sweep; checks the message and the traces."""
    place = Path(source).parent
    output = Path(options.pop("output", place / "deep" / "out"))
    before = digest_directory(place)
    if "data" not in options:
        options["data"] = str(write_token_ids(place / "ids.npy", 4, 32))
        before = digest_directory(place)
    options = {"recipe": WEIGHT_ONLY, "calibration": SIZE, **options}
    config = golden_config(output, checkpoint=str(source), **options)
    with pytest.raises(LayersweepError) as caught:
        calibrate(config, CONF_DIR, Place(0, world, 0), "")
    error = caught.value
    text = str(error)
    assert type(error) is kind, text
    for expected, part in (
        (what, error.what),
        (value, str(error.value)),
        (rule, error.rule),
        (remedy, error.remedy),
    ):
        assert expected in part, text
        assert part, f"a part of the message is empty: {text}"
        assert part in text
    assert digest_directory(place) == before, "the refused job left or changed files"
    assert not list(place.rglob("*.partial"))
    return error


def write_recipe(directory: Path, *entries: str) -> str:
    """A recipe of the given entries after everything was switched off."""
    path = directory / "recipe.yaml"
    lines = [
        "imports: {nvfp4: configs/numerics/nvfp4_static, fp8: configs/numerics/fp8}",
        "metadata: {recipe_type: ptq, description: made for a test}",
        "quantize:",
        "  algorithm: max",
        "  quant_cfg:",
        "    - {quantizer_name: '*', enable: false}",
        *(f"    - {{{entry}}}" for entry in entries),
    ]
    path.write_text("\n".join(lines))
    return str(path)


# --- layouts


def test_k_is_not_a_multiple_of_16_after_sharding_by_tp(source: Path) -> None:
    refuse(
        LayoutError,
        source,
        world=2,
        tp=2,
        recipe=EVERYTHING,
        what="backbone.layers.1.mixer.shared_experts.down_proj.weight",
        value="K=48 / tp=2 = 24",
        rule="multiple of 16",
        remedy="parallel.tp <= 1",
    )


def test_k_is_not_a_multiple_of_16_after_sharding_by_etp(source: Path) -> None:
    refuse(
        LayoutError,
        source,
        world=4,
        etp=4,
        recipe=EVERYTHING,
        what=f"{EXPERT}.0.down_proj.weight",
        value="K=32 / etp=4 = 8",
        rule="multiple of 16",
        remedy="parallel.etp <= 2",
    )


def test_k_is_not_a_multiple_of_16_at_all(tmp_path: Path) -> None:
    refuse(
        RecipeError,
        write_checkpoint(tmp_path / "source", moe_intermediate_size=40),
        what=f"{EXPERT}.0.down_proj.weight",
        value="K=40",
        rule="multiple of 16",
        remedy="*down_proj*",
    )


def test_several_refusals_come_together(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    config = golden_config(
        tmp_path / "out",
        checkpoint=str(source),
        recipe=EVERYTHING,
        tp=2,
        calibration={**SIZE, "seq_len": 31},
    )
    with pytest.raises(LayersweepError, match="2 reasons not to start") as caught:
        calibrate(config, CONF_DIR, Place(0, 2, 0), "")
    assert "K=48 / tp=2 = 24" in str(caught.value)
    assert "calibration.seq_len=30" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("world", "degrees", "what", "value", "rule"),
    [
        (4, {"tp": 3}, "parallel degrees", "world=4, tp=3", "world = tp * dp = 3 * dp"),
        (4, {"ep": 3}, "parallel degrees", "ep=3", "world = etp * ep * edp = 1 * 3 * edp"),
        (2, {"tp": 4}, "parallel degrees", "world=2, tp=4", "in whole numbers"),
        (2, {"tp": 0}, "parallel.tp", "0", "at least 1"),
        (2, {"ep": 0}, "parallel.ep", "0", "at least 1"),
        (2, {"etp": 0}, "parallel.etp", "0", "at least 1"),
        (3, {"ep": 3}, "parallel.ep", "3", "must divide n_routed_experts=8"),
        (16, {"ep": 16}, "parallel.ep", "16", "must divide n_routed_experts=8"),
        (3, {"etp": 3}, "parallel.etp", "3", "must divide moe_intermediate_size=32"),
    ],
)
def test_degrees_that_do_not_divide(
    world: int, degrees: dict[str, int], what: str, value: str, rule: str, source: Path
) -> None:
    options = {"ep": 1, **degrees} if "ep" not in degrees else degrees
    refuse(LayoutError, source, world=world, what=what, value=value, rule=rule, **options)


@pytest.mark.parametrize(
    ("pattern", "tp", "rule"),
    [
        ("M", 16, "must divide mamba_num_heads=8"),
        ("MM", 3, "must divide mamba_num_heads=8"),
        ("**", 8, "must divide num_attention_heads=4"),
        ("-", 3, "must divide"),
        ("E", 5, "must divide moe_shared_expert_intermediate_size=48"),
    ],
)
def test_more_ranks_than_the_layers_can_be_cut_into(
    pattern: str, tp: int, rule: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", hybrid_override_pattern=pattern)
    config = golden_config(
        tmp_path / "out",
        checkpoint=str(source),
        recipe="fp8",
        tp=tp,
        ep=1,
        calibration={**SIZE, "seq_len": 240},
    )
    with pytest.raises(LayersweepError) as caught:
        calibrate(config, CONF_DIR, Place(0, tp, 0), "")
    assert f"parallel.tp: found {tp}; {rule}" in str(caught.value)
    assert "choose another degree" in str(caught.value)


def test_key_value_heads_that_cannot_be_shared_evenly(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "source",
        hybrid_override_pattern="*",
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    refuse(
        LayoutError,
        source,
        world=3,
        tp=3,
        recipe="fp8",
        calibration={**SIZE, "seq_len": 30},
        what="parallel.tp",
        value="3",
        rule="num_key_value_heads=4 or be a multiple",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="has GPUs")
def test_more_ranks_than_gpus(source: Path) -> None:
    refuse(
        ConfigError,
        source,
        device=Device.cuda,
        what="device",
        value="0 GPUs for local rank 0",
        rule="GPU of its own",
        remedy="device=cpu",
    )


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
    refuse(SourceError, source, what=str(path), value=value, remedy="fetch it again")


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


# --- recipes


def test_enabled_format_that_ends_on_no_tensor(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", hybrid_override_pattern="M*")
    refuse(
        RecipeError,
        source,
        recipe="nvfp4_four_over_six",
        what="'*mixer.experts.*weight_quantizer'",
        value="ends on no tensor of this model",
        rule="must be used",
        remedy="check the pattern",
    )


def test_enabled_format_that_a_later_entry_switches_off(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "quantizer_name: '*.mixer.in_proj*weight_quantizer', cfg: {$import: fp8}",
        "quantizer_name: '*.mixer.up_proj*weight_quantizer', cfg: {$import: nvfp4}",
        "quantizer_name: '*.mixer.up_proj*', enable: false",
    )
    refuse(
        RecipeError,
        source,
        recipe=recipe,
        what="'*.mixer.up_proj*weight_quantizer'",
        value="no tensor",
    )


def test_recipe_that_switches_everything_off(source: Path, tmp_path: Path) -> None:
    refuse(RecipeError, source, recipe=write_recipe(tmp_path), value="no weight and no KV cache")


def test_experts_of_one_layer_with_two_formats(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "quantizer_name: '*mixer.experts.*weight_quantizer*', cfg: {$import: nvfp4}",
        "quantizer_name: '*mixer.experts.down_proj*weight_quantizer*', cfg: {$import: fp8}",
    )
    error = refuse(
        RecipeError,
        source,
        recipe=recipe,
        what="routed experts of layer 1",
        rule="all experts of a layer must have one format",
        remedy="patterns",
    )
    assert "NVFP4" in str(error)
    assert "FP8" in str(error)


def test_one_expert_with_another_format(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "quantizer_name: '*mixer.experts.*weight_quantizer*', cfg: {$import: nvfp4}",
        "quantizer_name: '*layers.5.mixer.experts.*_weight_quantizers.3', enable: false",
    )
    refuse(
        RecipeError,
        source,
        recipe=recipe,
        what="routed experts of layer 5",
        value="BF16 for up_proj/down_proj of experts 3",
        rule="one format",
    )


def test_unknown_recipe(source: Path) -> None:
    refuse(RecipeError, source, recipe="nvfp4_four_over_sex", what="nvfp4_four_over_sex")


# --- calibration data


def make_text_source(tmp_path: Path) -> Path:
    """A checkpoint with the demo's tokenizer."""
    vocabulary = json.loads((DEMO_DIRECTORY / "config.json").read_text())["vocab_size"]
    source = write_checkpoint(tmp_path / "source", vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, source)
    return source


def test_too_little_text(tmp_path: Path) -> None:
    source = make_text_source(tmp_path)
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "a short text"}))
    error = refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(data),
        what=str(data),
        value="tokens",
        rule="4 sequences of 32 tokens need 128",
        remedy="add text",
    )
    assert re.search(r"found \d+ tokens", str(error))


def test_tokenizer_is_missing(source: Path) -> None:
    (source / "tokenizer_config.json").unlink()
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data="demo",
        what=f"tokenizer in {source}",
        rule="tokenizer of the checkpoint",
        remedy="tokenizer.json",
    )


def test_no_such_text(tmp_path: Path) -> None:
    source = make_text_source(tmp_path)
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(tmp_path / "nothing.jsonl"),
        what="nothing.jsonl",
        value="no such file",
        remedy="correct the path",
    )


def test_tokenizer_of_another_model(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, source)
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data="demo",
        what="token ids",
        rule="ids 0 to 95",
        remedy="tokenizer that belongs",
    )


def test_token_file_that_is_too_small(source: Path, tmp_path: Path) -> None:
    data = write_token_ids(tmp_path / "small.npy", 3, 32)
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(data),
        value="3 sequences of 32 tokens",
        rule="4 sequences of 32 tokens are needed",
        remedy="calibration.num_sequences=3",
    )


def test_token_file_of_numbers_that_are_no_ids(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros((4, 32)))
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(tmp_path / "floats.npy"),
        value="float64 [4, 32]",
        rule="integers",
    )


def test_sequences_that_tp_cannot_cut(source: Path) -> None:
    refuse(
        LayoutError,
        source,
        world=2,
        tp=2,
        recipe="fp8",
        calibration={**SIZE, "seq_len": 31},
        what="calibration.seq_len",
        value="31",
        rule="parallel.tp=2",
        remedy="calibration.seq_len=30",
    )


# --- the output


def test_output_that_is_not_empty(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "taken"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    refuse(
        OutputError,
        source,
        output=output,
        what=str(output),
        value="a directory with files in it",
        rule="never overwritten",
        remedy="choose another output",
    )


def test_output_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    refuse(OutputError, source, output=tmp_path / "taken", value="a file", rule="must not exist")


@pytest.mark.parametrize("place", ["source", "source/out", "source/deep/out", "."])
def test_output_and_source_in_each_other(place: str, source: Path, tmp_path: Path) -> None:
    refuse(
        OutputError,
        source,
        output=tmp_path / place,
        data=str(write_token_ids(tmp_path / "ids.npy", 4, 32)),
        value=f"the source is {source}",
        rule="must not lie in each other",
        remedy="choose another output",
    )


def test_work_directory_that_is_no_run(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    config = golden_config(tmp_path / "out", checkpoint=str(source), recipe=WEIGHT_ONLY)
    with pytest.raises(OutputError, match=r"out\.partial.*no journal.*choose another output"):
        calibrate(config, CONF_DIR, Place(), "")
    assert (work / "notes.txt").read_text() == "mine"


def test_unfinished_run_of_another_job(source: Path, tmp_path: Path) -> None:
    ids = str(write_token_ids(tmp_path / "ids.npy", 4, 32))
    name = f"{EXPERT}.7.down_proj.weight"
    good = load_file(source / "model.safetensors")[name]
    edit_tensors(source, **{name: torch.full_like(good, torch.nan)})
    config = golden_config(tmp_path / "out", checkpoint=str(source), recipe=WEIGHT_ONLY, data=ids)
    with pytest.raises(NumericsError):
        calibrate(config, CONF_DIR, Place(), "")
    kept = digest_directory(tmp_path / "out.partial")
    other = golden_config(
        tmp_path / "out", checkpoint=str(source), recipe=WEIGHT_ONLY, data=ids, cast=True
    )
    with pytest.raises(OutputError, match="cast"):
        calibrate(other, CONF_DIR, Place(), "")
    assert digest_directory(tmp_path / "out.partial") == kept


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense=1"], "nonsense"),
        (["calibration.seq_length=3"], "seq_length"),
        (["parallel.tp=two"], "parallel.tp"),
        ([], "checkpoint, output"),
        (["checkpoint=/nowhere/at/all", "output=out"], "no such directory"),
    ],
    ids=["option", "nested-option", "type", "mandatory", "source"],
)
def test_command_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.calibrate", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode in (1, 2), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- in the sweep: NaN and Inf, and the loss


def refuse_in_sweep(
    source: Path, *fragments: str, rank: int | None = None, world: int = 1, **options: Any
) -> str:
    """Runs a job on forked ranks that one of them must refuse; returns what that rank said."""
    place = source.parent
    before = digest_directory(source)
    options = {"recipe": EVERYTHING, "calibration": SIZE, **options}
    with pytest.raises(RankError) as caught:
        run_job(
            place / "out",
            world=world,
            checkpoint=str(source),
            data=str(write_token_ids(place / "ids.npy", 4, 32)),
            **{"unobserved_input_scale": 1.0, **options},
        )
    text = caught.value.report.strip().splitlines()[-1]
    assert text.startswith("pipeline.errors.NumericsError: "), caught.value.report
    for fragment in fragments:
        assert fragment in text, text
    assert "To mend it" in text
    if rank is not None:
        assert f"(rank {rank})" in text
        assert caught.value.rank == rank
    assert not (place / "out").exists()
    assert digest_directory(source) == before
    return text


def spoil(source: Path, name: str, value: float) -> None:
    """Puts one bad number into the middle of a tensor."""
    tensor = load_file(source / "model.safetensors")[name]
    tensor.view(-1)[tensor.numel() // 2] = value
    edit_tensors(source, **{name: tensor})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [f"{EXPERT}.5.down_proj.weight", "backbone.layers.3.mixer.up_proj.weight"],
    ids=["expert", "dense"],
)
def test_bad_number_in_a_streamed_weight(name: str, value: float, source: Path) -> None:
    spoil(source, name, value)
    output = source.parent / "out"
    config = golden_config(output, checkpoint=str(source), recipe=WEIGHT_ONLY)
    with pytest.raises(NumericsError) as caught:
        calibrate(config, CONF_DIR, Place(), "")
    assert name in caught.value.what
    assert "rank 0" in caught.value.what
    assert caught.value.value == "NaN or Inf"
    assert caught.value.remedy
    assert not output.exists()


@pytest.mark.parametrize(
    "name",
    ["backbone.embeddings.weight", "backbone.layers.1.norm.weight", "lm_head.weight"],
)
def test_bad_number_in_a_tensor_that_is_only_copied(name: str, source: Path) -> None:
    """A conversion without a forward pass must not publish it either."""
    spoil(source, name, torch.nan)
    config = golden_config(source.parent / "out", checkpoint=str(source), recipe=WEIGHT_ONLY)
    with pytest.raises(LayersweepError, match=re.escape(name)):
        calibrate(config, CONF_DIR, Place(), "")
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize(
    ("layout", "name", "rank"),
    [
        ({"world": 2, "ep": 2}, f"{EXPERT}.5.down_proj.weight", 1),
        ({"world": 2, "ep": 2}, f"{EXPERT}.2.up_proj.weight", 0),
        ({"world": 2, "tp": 2, "recipe": "fp8"}, "backbone.layers.2.mixer.o_proj.weight", None),
        ({"world": 2, "ep": 1}, "backbone.layers.3.mixer.down_proj.weight", None),
        ({"world": 2, "etp": 2}, f"{EXPERT}.5.down_proj.weight", None),
    ],
    ids=["ep2-rank1", "ep2-rank0", "tp2", "dp2", "etp2"],
)
def test_bad_number_in_a_weight_on_two_ranks(
    layout: dict[str, Any], name: str, rank: int | None, source: Path
) -> None:
    spoil(source, name, torch.nan)
    text = refuse_in_sweep(source, name, "NaN or Inf", "corrupt", rank=rank, **layout)
    assert re.search(r"\(rank [01]\)", text)


def test_rank_named_is_the_one_that_holds_the_bad_number(source: Path) -> None:
    name = "backbone.layers.2.mixer.o_proj.weight"
    tensor = load_file(source / "model.safetensors")[name]
    tensor[0, -1] = torch.nan  # K is cut by TP: rank 1 holds the last column
    edit_tensors(source, **{name: tensor})
    text = refuse_in_sweep(source, name, world=2, tp=2, recipe="fp8")
    assert re.search(r"rank[s ]*1\b", text), text


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("backbone.embeddings.weight", "layer"),
        ("backbone.layers.1.norm.weight", "layer 1: input activations of"),
        ("backbone.layers.1.mixer.gate.weight", "layer"),
        ("backbone.layers.0.mixer.A_log", "layer 0: input activations of out_proj"),
        ("backbone.norm_f.weight", "nan nats per token"),
        ("lm_head.weight", "nan nats per token"),
    ],
)
def test_bad_number_in_an_unquantized_weight(name: str, fragment: str, source: Path) -> None:
    tensor = load_file(source / "model.safetensors")[name]
    edit_tensors(source, **{name: torch.full_like(tensor, torch.nan)})
    refuse_in_sweep(source, fragment)


@pytest.mark.parametrize("layout", [{}, {"world": 2, "tp": 2, "recipe": "fp8"}], ids=["one", "tp2"])
def test_activations_that_overflow(layout: dict[str, Any], source: Path) -> None:
    name = "backbone.layers.3.mixer.up_proj.weight"
    huge = load_file(source / "model.safetensors")[name] * 1e30  # relu2 squares it
    edit_tensors(source, **{name: huge})
    text = refuse_in_sweep(source, "layer 3", "down_proj", "NaN or Inf", **layout)
    assert "rank 0" in text
    assert "compute_dtype" in text


def test_output_of_the_last_layer_that_overflows(source: Path) -> None:
    name = "backbone.layers.5.mixer.fc2_latent_proj.weight"
    huge = load_file(source / "model.safetensors")[name] * 2e38
    edit_tensors(source, **{name: huge.clamp(-3e38, 3e38)})
    refuse_in_sweep(source, "loss", "nan")


def test_projection_that_no_token_reached(source: Path) -> None:
    name = "backbone.layers.3.mixer.up_proj.weight"
    edit_tensors(source, **{name: torch.zeros(64, 64).bfloat16()})
    refuse_in_sweep(
        source,
        "backbone.layers.3.mixer.down_proj",
        "only zeros",
        "unobserved_input_scale=VALUE",
        unobserved_input_scale=None,
    )


def test_bad_loss_is_refused_and_can_be_allowed_afterwards(source: Path, tmp_path: Path) -> None:
    refuse_in_sweep(
        source,
        "next-token loss",
        "nats per token",
        "worse than that of token frequencies",
        "allow_bad_loss=true",
        allow_bad_loss=False,
    )
    output = run_job(
        tmp_path / "out",
        checkpoint=str(source),
        recipe=EVERYTHING,
        calibration=SIZE,
        data=str(tmp_path / "ids.npy"),
        unobserved_input_scale=1.0,
    )
    assert read_checkpoint(output)
