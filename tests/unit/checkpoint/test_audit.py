import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.writer import file_sha256, write_safetensors
from tests.unit.checkpoint.tiny import (
    FP8,
    W4A16,
    byte_view,
    edit_configs,
    edit_json,
    expect_problems,
    export,
    load,
    mixed_formats,
    reindex,
    rewrite,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "modelopt_tiny"
EXPERT = "backbone.layers.1.mixer.experts.0.up_proj"
IN = "backbone.layers.0.mixer.in_proj"
Q = "backbone.layers.3.mixer.q_proj"
Copy = Callable[[Path], Path]
Tensors = dict[str, torch.Tensor]


def test_exports_pass_with_their_source(
    source: Source, mixed_export: Path, flat_export: Path
) -> None:
    for directory in (mixed_export, flat_export):
        sums = {path.name: file_sha256(path) for path in directory.glob("*.safetensors")}
        result = audit(directory, source=source, checksums=sums, hopper=True)
        assert result.ok, result.problems
        result.raise_if_failed()
        names = [check.name for check in result.checks]
        assert {"checksums", "copied tensors", "relative errors", "size"} <= set(names)
        assert all(0.01 < error < 0.12 for error in result.figures.relative_errors.values())
        assert result.figures.parameters == sum(info.elements for info in source.tensors.values())
        assert 4.5 < result.figures.effective_bits < 16
        assert all(share == 0 for share in result.figures.flushed_share.values())
    assert len(audit(mixed_export).figures.flushed_share) == 6


def test_weight_only_and_all_fp8(source: Source, tmp_path: Path) -> None:
    formats = mixed_formats(Architecture.from_hf_config(source.config))
    weight_only = {module: W4A16 for module in formats if ".experts." in module}
    for name, chosen in {"w4a16": weight_only, "fp8": dict.fromkeys(formats, FP8)}.items():
        directory = export(source, tmp_path / name, chosen, kv_cache_fp8=False)
        result = audit(directory, source=source)
        assert result.ok, result.problems


def test_planned_size(mixed_export: Path) -> None:
    figures = audit(mixed_export).figures
    planned = {
        "expected_bytes": figures.tensor_bytes,
        "expected_effective_bits": figures.effective_bits,
    }
    assert audit(mixed_export, **planned).ok
    expect_problems(mixed_export, "instead of the planned 1", expected_bytes=1)
    expect_problems(
        mixed_export, "effective bits instead of the planned", expected_effective_bits=5.0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}.weight_scale"), f"key set: {EXPERT}.weight_scale is missing"),
        (lambda t: t.pop(f"{EXPERT}.input_scale"), f"{EXPERT}.input_scale is missing"),
        (lambda t: t.pop(f"{IN}.weight"), f"{IN}.weight is missing"),
        (lambda t: t.pop("backbone.layers.0.mixer.D"), "backbone.layers.0.mixer.D is missing"),
        (lambda t: t.pop("backbone.layers.3.mixer.k_proj.k_scale"), "k_scale is missing"),
        (lambda t: t.update({"backbone.new": torch.ones(2)}), "key set: backbone.new is extra"),
        (lambda t: t.update({f"{IN}.weight_scale_2": torch.ones(())}), "weight_scale_2 is extra"),
        (
            lambda t: t.update({f"{EXPERT}.weight_scale_2": torch.ones(1)}),
            "weight_scale_2: shape [1] instead of []",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"].T.contiguous()}),
            "weight: shape [32, 64] instead of [64, 32]",
        ),
        (
            lambda t: t.update({f"{EXPERT}.input_scale": torch.ones((), dtype=torch.bfloat16)}),
            "input_scale: dtype BF16 instead of F32",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight_scale": byte_view(t[f"{EXPERT}.weight_scale"])}),
            "weight_scale: dtype U8 instead of F8_E4M3",
        ),
        (
            lambda t: t.update({f"{IN}.weight": t[f"{IN}.weight"].bfloat16()}),
            f"stored formats: {IN}: config says FP8, stored is BF16",
        ),
        (
            lambda t: byte_view(t[f"{EXPERT}.weight_scale"])[3].fill_(0x7F),
            f"block scales: {EXPERT}.weight_scale has 4 NaN of 256 scales",
        ),
        (lambda t: byte_view(t[f"{EXPERT}.weight_scale"])[0, :2].fill_(0xFF), "has 2 NaN"),
        (lambda t: byte_view(t[f"{EXPERT}.weight_scale"])[0, :3].fill_(0), "has 3 zero"),
        (lambda t: byte_view(t[f"{EXPERT}.weight_scale"])[0, :1].fill_(0x80), "has 1 zero"),
        (lambda t: byte_view(t[f"{EXPERT}.weight_scale"])[0, :1].fill_(0xB8), "has 1 negative"),
        (
            lambda t: t[f"{EXPERT}.weight_scale_2"].fill_(0.0),
            f"scalar scales: {EXPERT}.weight_scale_2 is 0.0; scales must be finite and positive",
        ),
        (lambda t: t[f"{IN}.input_scale"].fill_(float("inf")), "input_scale is inf"),
        (lambda t: t[f"{IN}.weight_scale"].fill_(float("nan")), "weight_scale is nan"),
        (lambda t: t["backbone.layers.3.mixer.v_proj.v_scale"].neg_(), "v_scale is -1.0"),
        (
            lambda t: t[f"{Q}.input_scale"].mul_(2),
            "fused scales: backbone.layers.3.mixer.qkv_proj: input_scale differs",
        ),
        (lambda t: t[f"{Q}.weight_scale_2"].mul_(2), "qkv_proj: weight_scale_2 differs"),
    ],
)
def test_one_corrupt_tensor(mixed_export: Path, copy_of: Copy, change: Any, message: str) -> None:
    directory = copy_of(mixed_export)
    rewrite(directory, change)
    expect_problems(directory, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("mtp.")], "mtp: config.json says"),
        (
            lambda t: t.update(
                {n: t[n].to(torch.float8_e4m3fn) for n in t if n.startswith("mtp.")}
            ),
            "F8_E4M3; mtp.* stays as it is",
        ),
        (
            lambda t: t.update({"mtp.layers.0.mixer.q_proj.weight_scale": torch.ones(())}),
            "mtp.layers.0.mixer.q_proj.weight_scale: F32; mtp.* stays",
        ),
    ],
)
def test_mtp(mixed_export: Path, copy_of: Copy, change: Any, message: str) -> None:
    directory = copy_of(mixed_export)
    rewrite(directory, change, file=1)
    expect_problems(directory, message)


def test_files_and_index(mixed_export: Path, copy_of: Copy) -> None:
    directory = copy_of(mixed_export)
    first, second = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    good, data = index.read_bytes(), second.read_bytes()

    def break_and_mend(message: str, change: Callable[[dict[str, Any]], Any]) -> None:
        edit_json(index, change)
        expect_problems(directory, message)
        index.write_bytes(good)

    break_and_mend("metadata.total_size is 7", lambda v: v["metadata"].update(total_size=7))
    break_and_mend(
        "names ghost, which is in no file", lambda v: v["weight_map"].update(ghost=first.name)
    )
    break_and_mend("is not in the index", lambda v: v["weight_map"].pop("lm_head.weight"))
    break_and_mend(
        "lm_head.weight is in",
        lambda v: (
            v["weight_map"].update({"lm_head.weight": second.name})
            if v["weight_map"]["lm_head.weight"] == first.name
            else v["weight_map"].update({"lm_head.weight": first.name})
        ),
    )
    break_and_mend(
        "names x.safetensors, which", lambda v: v["weight_map"].update(a="x.safetensors")
    )
    shutil.copy(second, directory / "extra.safetensors")
    expect_problems(directory, "extra.safetensors is not in the index", "and in model-0000")
    (directory / "extra.safetensors").unlink()
    (directory / "old.bin").write_bytes(b"")
    expect_problems(directory, "old.bin does not belong here")
    (directory / "old.bin").unlink()
    second.write_bytes(data[:-100])
    expect_problems(directory, "the file is truncated")
    second.unlink()
    expect_problems(
        directory, "names model-00002-of-00002.safetensors, which does not exist", "is missing"
    )
    index.unlink()
    expect_problems(directory, "index.json is missing")


def test_checksums(mixed_export: Path, copy_of: Copy) -> None:
    directory = copy_of(mixed_export)
    sums = {path.name: file_sha256(path) for path in directory.glob("*.safetensors")}
    path = directory / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    expect_problems(
        directory, "checksums: model-00001-of-00002.safetensors: SHA-256", checksums=sums
    )
    expect_problems(directory, "no checksum is known", checksums={})
    expect_problems(
        directory, "gone.safetensors: missing", checksums=sums | {"gone.safetensors": ""}
    )


def test_ignore_entry_that_matches_by_substring(mixed_export: Path, copy_of: Copy) -> None:
    directory = copy_of(mixed_export)
    edit_configs(directory, lambda layers, ignore: ignore.append("backbone.layers.1"))
    expect_problems(
        directory, "ignore entry 'backbone.layers.1' also excludes the quantized backbone"
    )


def test_ignore_entry_that_swallows_the_model(flat_export: Path, copy_of: Copy) -> None:
    directory = copy_of(flat_export)
    edit_configs(directory, lambda layers, ignore: ignore.append("*mixer*"))
    expect_problems(directory, "ignore entry '*mixer*' also excludes", "config says unquantized")


def test_missing_ignore_entries(mixed_export: Path, flat_export: Path, copy_of: Copy) -> None:
    directory = copy_of(flat_export)
    edit_configs(directory, lambda layers, ignore: ignore.remove("lm_head"))
    expect_problems(directory, "lm_head is not ignored")
    edit_configs(directory, lambda layers, ignore: ignore.append("lm_head"))
    edit_configs(directory, lambda layers, ignore: ignore.remove("mtp*"))
    expect_problems(directory, "mtp.layers.0.mixer.qkv_proj is not ignored")
    edit_configs(directory, lambda layers, ignore: ignore.append("mtp*"))
    edit_configs(directory, lambda layers, ignore: ignore.remove(Q))
    expect_problems(directory, "k_proj, v_proj ignored, the others not; vLLM refuses that")
    edit_configs(directory, lambda layers, ignore: ignore.append(Q))
    edit_configs(directory, lambda layers, ignore: ignore.remove(IN))
    expect_problems(directory, f"{IN}: config says NVFP4, stored is BF16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, i: q.pop(Q), "fused formats: backbone.layers.3.mixer.qkv_proj:"),
        (lambda q, i: q.pop(EXPERT), "experts: layer 1: 1 x unquantized (e.g. " + EXPERT),
        (lambda q, i: q[EXPERT].update(quant_algo="INT4"), "unknown quant_algo 'INT4'"),
        (lambda q, i: q[EXPERT].update(group_size=32), "group_size 32"),
        (lambda q, i: q.update({"backbone.x": {"quant_algo": "FP8"}}), "is no projection of this"),
        (
            lambda q, i: q.update({IN + ".\x00backbone.pt_name_sentinel": q.pop(IN)}),
            "names: 1 broken names in quantized_layers",
        ),
        (lambda q, i: i.append("lm_head.pt_name_sentinel"), "1 broken names in ignore"),
        (lambda q, i: q.clear(), "quantized_layers is empty"),
    ],
)
def test_broken_description(mixed_export: Path, copy_of: Copy, change: Any, message: str) -> None:
    directory = copy_of(mixed_export)
    edit_configs(directory, change)
    expect_problems(directory, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("quantization_config"), "config.json has no quantization_config"),
        (lambda c: c.update(model_type="llama"), "model_type"),
        (lambda c: c["quantization_config"].update(kv_cache_scheme="FP8"), "vLLM reads only"),
        (lambda c: c["quantization_config"].pop("kv_cache_scheme"), "k_scale is extra"),
        (lambda c: c["quantization_config"].update(quant_method="awq"), "quant_method is 'awq'"),
        (lambda c: c["quantization_config"].update(quant_algo="NVFP5"), "quant_algo is 'NVFP5'"),
        (lambda c: c["quantization_config"].pop("ignore"), "has no ignore list"),
        (lambda c: c["quantization_config"]["ignore"].pop(), "exclude_modules / ignore differs"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["targets"].pop(),
            "config_groups targets are not those of quantized_layers",
        ),
    ],
)
def test_broken_config(mixed_export: Path, copy_of: Copy, change: Any, message: str) -> None:
    directory = copy_of(mixed_export)
    edit_json(directory / "config.json", change)
    expect_problems(directory, message)


def test_missing_configs_and_directory(mixed_export: Path, copy_of: Copy) -> None:
    directory = copy_of(mixed_export)
    (directory / "hf_quant_config.json").unlink()
    expect_problems(directory, "hf_quant_config.json: No such file")
    (directory / "config.json").write_text("{")
    expect_problems(directory, "config.json: invalid JSON")
    expect_problems(directory / "nothing", "is not a directory")


def test_every_problem_is_counted_and_ten_are_shown(mixed_export: Path, copy_of: Copy) -> None:
    directory = copy_of(mixed_export)
    rewrite(directory, lambda t: [t.pop(n) for n in list(t) if n.endswith("input_scale")])
    result = audit(directory)
    shown = [problem for problem in result.problems if problem.startswith("key set")]
    assert len(shown) == 11
    assert "more" in shown[-1]


def test_same_tensor_twice_in_two_files(mixed_export: Path, copy_of: Copy) -> None:
    directory = copy_of(mixed_export)
    first, second = sorted(directory.glob("*.safetensors"))
    tensors = load(second)
    tensors["backbone.layers.0.mixer.D"] = load(first)["backbone.layers.0.mixer.D"]
    write_safetensors(second, tensors)
    reindex(directory)
    expect_problems(directory, "files: backbone.layers.0.mixer.D is in model-00001")
