"""Every kind of nemotron_h checkpoint goes in; what comes out passes the audit."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.entry import CONF_DIR
from pipeline.architecture import Architecture, expected_tensors
from pipeline.calibrate import Place, calibrate
from pipeline.checkpoint.audit import AuditResult, audit
from pipeline.checkpoint.hub import DEMO_DIRECTORY
from pipeline.checkpoint.source import open_source
from tests.e2e.harness import golden_config, is_activation_scalar, read_checkpoint, run_job
from tests.e2e.models import (
    SMALL_FILES,
    Files,
    digest_directory,
    edit_tensors,
    write_checkpoint,
    write_token_ids,
)

EVERYTHING = "general/ptq/nvfp4_default-kv_fp8"
SIZE = {"num_sequences": 4, "seq_len": 32, "loss_sequences": 1}
BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "all_kinds": {},
    "without_latents": {"moe_latent_size": None},
    "without_shared_experts": {"n_shared_experts": 0},
    "without_mlp_layers": {"hybrid_override_pattern": "MEM*E"},
    "mlp_layers_only_beside_mamba": {"hybrid_override_pattern": "M-M-*-"},
    "biases": BIASES,
    "biases_without_latents_and_conv_bias": {
        **BIASES,
        "use_conv_bias": False,
        "moe_latent_size": None,
    },
    "tied": {"tie_word_embeddings": True},
    "mtp": {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
    "tied_mtp_biases": {
        **BIASES,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    },
    "one_layer": {"hybrid_override_pattern": "E"},
}
WORDS: dict[str, dict[str, Any]] = {
    "pattern": {"hybrid_override_pattern": "ME*-ME", "num_hidden_layers": 6},
    "nvidia": {
        "hybrid_override_pattern": None,
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"],
    },
    "transformers": {
        "hybrid_override_pattern": None,
        "layers_block_type": [
            *("linear_attention", "moe", "full_attention"),
            *("mlp", "linear_attention", "moe"),
        ],
    },
    "layer_types": {
        "hybrid_override_pattern": None,
        "layer_types": [
            *("linear_attention", "moe", "full_attention"),
            *("mlp", "linear_attention", "moe"),
        ],
    },
    "both": {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"]},
}
LAYOUTS = {
    "single_file": Files(),
    "sharded_with_index": Files(shards=3),
    "sharded_without_index": Files(shards=3, index=False),
    "hub_cache": Files(shards=2, in_hub_cache=True),
    "transformers_embedding_name": Files(shards=2, embedding="backbone.embedding.weight"),
}


@pytest.fixture(scope="module")
def weight_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe file: weights of every projection NVFP4, nothing else."""
    path = tmp_path_factory.mktemp("recipe") / "weights.yaml"
    path.write_text(
        "imports: {nvfp4: configs/numerics/nvfp4_static}\n"
        "metadata: {recipe_type: ptq, description: weights only}\n"
        "quantize:\n"
        "  algorithm: max\n"
        "  quant_cfg:\n"
        "    - {quantizer_name: '*', enable: false}\n"
        "    - {quantizer_name: '*.mixer.*weight_quantizer', cfg: {$import: nvfp4}}\n"
        "    - {quantizer_name: '*.mixer.conv1d.*', enable: false}\n"
    )
    return str(path)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_calibrates_every_architecture(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", **ARCHITECTURES[name])
    before = digest_directory(source)
    output = run_job(
        tmp_path / "out",
        checkpoint=str(source),
        recipe=EVERYTHING,
        data=str(write_token_ids(tmp_path / "ids.npy", 4, 32)),
        calibration=SIZE,
        unobserved_input_scale=1.0,  # one expert of a random model may stay unseen
    )
    check_conversion(output, source)
    assert digest_directory(source) == before
    scalars = [name for name in read_checkpoint(output) if is_activation_scalar(name)]
    assert scalars


@pytest.mark.parametrize("name", ["biases", "tied_mtp_biases", "without_shared_experts"])
def test_converts_weights_without_a_forward_pass(
    name: str, weight_only: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", **ARCHITECTURES[name])
    output = convert(source, tmp_path / "out", weight_only)
    check_conversion(output, source)
    assert not any(is_activation_scalar(name) for name in read_checkpoint(output))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, weight_only: str) -> dict[str, Any]:
    """The tensors that come of the plainest checkpoint."""
    home = tmp_path_factory.mktemp("plain")
    return read_checkpoint(convert(write_checkpoint(home / "source"), home / "out", weight_only))


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_reads_every_layout_of_files(
    name: str, weight_only: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", LAYOUTS[name])
    output = convert(source, tmp_path / "out", weight_only)
    check_conversion(output, source)
    expected, found = dict(plain), read_checkpoint(output)
    embedding = LAYOUTS[name].embedding
    assert embedding in found
    expected[embedding] = expected.pop("backbone.embeddings.weight")
    assert found == expected
    assert not any(path.is_symlink() for path in output.rglob("*"))


def test_reads_the_hub_cache_by_id(
    weight_only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_checkpoint(tmp_path / "hub", Files(shards=2, in_hub_cache=True))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = convert("made/tiny", tmp_path / "out", weight_only)
    check_conversion(output, snapshot)


@pytest.mark.parametrize("words", sorted(WORDS))
def test_reads_both_vocabularies(
    words: str, weight_only: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", **WORDS[words])
    output = convert(source, tmp_path / "out", weight_only)
    check_conversion(output, source)
    assert read_checkpoint(output) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["F32", "F16"])
def test_casts_when_asked(
    dtype: torch.dtype, weight_only: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", Files(dtype=dtype))
    output = convert(source, tmp_path / "out", weight_only, cast=True)
    check_conversion(output, source)
    if dtype is torch.float32:  # the same weights as the BF16 checkpoint, so the same scales
        found = read_checkpoint(output)
        quantized = [name for name in plain if name.endswith(".weight_scale")]
        assert quantized
        for name in quantized:
            for key in (name, f"{name}_2", name.removesuffix("_scale")):
                assert found[key] == plain[key], key


def test_casts_before_the_forward_pass(tmp_path: Path) -> None:
    ids = write_token_ids(tmp_path / "ids.npy", 4, 32)
    outputs = []
    for name, files in (("f32", Files(dtype=torch.float32)), ("bf16", Files())):
        outputs.append(
            run_job(
                tmp_path / f"{name}-out",
                checkpoint=str(write_checkpoint(tmp_path / name, files)),
                recipe=EVERYTHING,
                data=str(ids),
                calibration=SIZE,
                cast=files.dtype is torch.float32,
            )
        )
        check_conversion(outputs[-1], tmp_path / name)
    found, expected = (read_checkpoint(output) for output in outputs)
    codes = [name for name, (dtype, _, _) in expected.items() if dtype in ("U8", "F8_E4M3")]
    assert codes
    assert all(found[name] == expected[name] for name in codes)


@pytest.mark.parametrize("suffix", [".txt", ".parquet", "directory"])
def test_calibrates_on_text_with_the_checkpoints_tokenizer(suffix: str, tmp_path: Path) -> None:
    vocabulary = json.loads((DEMO_DIRECTORY / "config.json").read_text())["vocab_size"]
    source = write_checkpoint(
        tmp_path / "source", hybrid_override_pattern="ME", vocab_size=vocabulary
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, source)
    data = write_text(tmp_path / "text", suffix)
    output = run_job(tmp_path / "out", checkpoint=str(source), data=str(data), calibration=SIZE)
    check_conversion(output, source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (DEMO_DIRECTORY / name).read_bytes()


def test_infinity_in_config_goes_out_as_it_came_in(weight_only: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    assert "Infinity" in (source / "config.json").read_text()
    output = convert(source, tmp_path / "out", weight_only)
    config = json.loads((output / "config.json").read_text())
    config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, math.inf]


def test_zero_weights_can_be_stored(tmp_path: Path) -> None:
    """An expert that never learnt, or a projection that starts at zero."""
    source = write_checkpoint(tmp_path / "source")
    zero = torch.zeros(32, 32).bfloat16()
    expert = "backbone.layers.1.mixer.experts.3"
    dead = {f"{expert}.{kind}_proj.weight": zero.clone() for kind in ("up", "down")}
    edit_tensors(source, **dead)
    output = run_job(
        tmp_path / "out",
        checkpoint=str(source),
        recipe=EVERYTHING,
        data=str(write_token_ids(tmp_path / "ids.npy", 4, 32)),
        calibration=SIZE,
    )
    check_conversion(output, source)
    codes = read_checkpoint(output)["backbone.layers.1.mixer.experts.3.up_proj.weight"][2]
    assert set(codes) == {0}


def test_mtp_stays_as_it_is_under_a_recipe_that_matches_it(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "source", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E"
    )
    output = run_job(
        tmp_path / "out",
        checkpoint=str(source),
        data=str(write_token_ids(tmp_path / "ids.npy", 4, 32)),
        calibration=SIZE,
    )
    before, after = read_checkpoint(source), read_checkpoint(output)
    mtp = {name for name in after if name.startswith("mtp.")}
    assert mtp == {name for name in before if name.startswith("mtp.")}
    assert all(after[name] == before[name] for name in mtp)
    assert any(".experts." in name for name in mtp)


def convert(source: Path | str, output: Path, recipe: str, **options: Any) -> Path:
    """A weight-only conversion in this process: it starts no process group."""
    config = golden_config(output, checkpoint=str(source), recipe=recipe, **options)
    report = calibrate(config, CONF_DIR, Place(), "options: {}\n")
    assert report is not None
    assert Path(report.output) == output
    return output


def check_conversion(output: Path, source: Path) -> None:
    """The audit against the source, and what must not depend on the audit being right."""
    opened = open_source(source)
    result: AuditResult = audit(output, source=opened)
    assert result.problems == []
    before, after = read_checkpoint(source), read_checkpoint(output)
    quantized = {name.removesuffix("_scale") for name in after if name.endswith(".weight_scale")}
    assert quantized
    architecture = Architecture.from_hf_config(opened.config)
    linears = {spec.name for spec in expected_tensors(architecture) if spec.is_linear_weight}
    assert quantized <= linears
    for name, value in before.items():
        if name in quantized:
            assert after[name][0] in ("U8", "F8_E4M3")
        else:
            assert after[name] == value, name
    extra = set(after) - set(before)
    assert {name.rpartition(".")[2] for name in extra} <= {
        *("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
    }
    for name in SMALL_FILES:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert not output.with_name(output.name + ".partial").exists()


def write_text(home: Path, suffix: str) -> Path:
    """Some text in a file of the given kind, or in a directory of two files."""
    home.mkdir()
    texts = [f"Line {number}: {'calibration text ' * 20}" for number in range(20)]
    if suffix == "directory":
        lines = [json.dumps({"text": text}) for text in texts]
        (home / "a.jsonl").write_text("\n".join(lines[:10]))
        (home / "b.jsonl").write_text("\n".join(lines[10:]))
        return home
    path = home / f"text{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(texts))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path
