import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.source import Source, open_source
from tests.unit.checkpoint.tiny import (
    byte_view,
    expect_problems,
    export,
    mixed_formats,
    rewrite,
    tiny_config,
    tiny_tensors,
    write_source,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "modelopt_tiny"
EXPERT = "backbone.layers.1.mixer.experts.0.up_proj"
IN = "backbone.layers.0.mixer.in_proj"
Copy = Callable[[Path], Path]
Tensors = dict[str, torch.Tensor]


def test_blocks_that_hopper_flushes(mixed_export: Path, copy_of: Copy) -> None:
    directory = copy_of(mixed_export)

    def shrink(tensors: Tensors) -> None:
        byte_view(tensors[f"{EXPERT}.weight_scale"])[:4].fill_(0x07)
        byte_view(tensors[f"{EXPERT}.weight_scale"])[4:].fill_(0x08)
        tensors[f"{EXPERT}.weight"][:2] = 0x88  # all codes are (negative) zeros: nothing to lose

    rewrite(directory, shrink)
    result = audit(directory)
    assert result.ok, result.problems
    blocks = 4 * 64 * 64 // 16  # two experts, up and down
    assert result.figures.flushed_share[1] == 8 / blocks
    assert any("Hopper would flush 8 of" in note for note in result.notes)


def test_width_that_hopper_cannot_run(tmp_path: Path) -> None:
    config = tiny_config(moe_intermediate_size=48)
    opened = open_source(write_source(tmp_path / "s", config, tiny_tensors(config)))
    formats = mixed_formats(Architecture.from_hf_config(config))
    directory = export(opened, tmp_path / "out", formats)
    result = audit(directory)
    assert result.ok, result.problems
    assert (
        "cannot run on Hopper, the first backbone.layers.1.mixer.experts.0.down" in result.notes[0]
    )
    expect_problems(directory, "in_features 48 % 64 != 0 (Hopper needs 64)", hopper=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["backbone.layers.0.mixer.D"].add_(1), "other bytes than the source's"),
        (
            lambda t: t.update({"backbone.norm_f.weight": t["backbone.norm_f.weight"].float()}),
            "F32 [64] instead of the source's BF16 [64]",
        ),
        (
            lambda t: t[f"{EXPERT}.weight"].copy_(t[f"{EXPERT}.weight"].flip(0)),
            f"relative errors: {EXPERT}.weight is 1.",
        ),
        (
            lambda t: t[f"{EXPERT}.weight"].copy_(
                (t[f"{EXPERT}.weight"] << 4) | (t[f"{EXPERT}.weight"] >> 4)
            ),
            "NVFP4 explains at most 0.2",
        ),
        (lambda t: t[f"{IN}.weight_scale"].mul_(1.2), "FP8 explains at most 0.06"),
    ],
)
def test_compared_with_the_source(
    source: Source, mixed_export: Path, copy_of: Copy, change: Any, message: str
) -> None:
    directory = copy_of(mixed_export)
    rewrite(directory, change)
    assert audit(directory).ok
    expect_problems(directory, message, source=source)


def test_mtp_and_small_files_of_the_source(
    source: Source, mixed_export: Path, copy_of: Copy
) -> None:
    directory = copy_of(mixed_export)
    name = "mtp.layers.0.norm.weight"
    rewrite(directory, lambda t: t.pop(name), file=1)
    (directory / "tokenizer.json").write_text("{ }")
    (directory / "nested" / "modeling.py").unlink()
    expect_problems(
        directory,
        f"{name} of the source is missing",
        "tokenizer.json differs from the source's",
        "nested/modeling.py of the source is missing",
        source=source,
    )


@pytest.mark.parametrize("recipe", ["four_over_six", "nvfp4_default-kv_fp8"])
def test_model_optimizers_broken_names_are_refused_and_nothing_else_is(
    recipe: str, tmp_path: Path
) -> None:
    directory = tmp_path / "export"
    directory.mkdir()
    for name in ("config.json", "hf_quant_config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / recipe / name, directory / name)
    expect_problems(directory, "broken names in")
    for name in ("config.json", "hf_quant_config.json"):
        value = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(_mended(value)))
    result = audit(directory)
    assert result.ok, result.problems
    opened = open_source(GOLDEN / "source")
    errors = audit(directory, source=opened).figures.relative_errors
    assert 0.02 < min(errors.values()) < max(errors.values()) < 0.12


def _mended(value: Any) -> Any:
    """Names without the sentinel, and one entry per expert projection instead of `experts`."""
    if isinstance(value, dict):
        mended = {}
        for key, inner in value.items():
            for name in _names(key):
                mended[name] = _mended(inner)
        return mended
    if isinstance(value, list):
        return [
            name for item in value for name in (_names(item) if isinstance(item, str) else [item])
        ]
    return value


def _names(name: str) -> list[str]:
    name = name.split("\x00")[0].rstrip(".")
    if not name.endswith(".experts"):
        return [name]
    return [f"{name}.{n}.{part}_proj" for n in range(8) for part in ("up", "down")]
