"""Loading: presets, the library, files, and what is refused before a model is looked at."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import RecipeError
from pipeline.recipe import library_names, load_recipe, preset_names

PRESETS = Path(__file__).parents[3] / "conf" / "recipe"
ULTRA = "models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6"


def write(directory: Path, algorithm: Any = "max", **changes: Any) -> Path:
    entry = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": "e4m3"}} | changes
    content = {
        "metadata": {"recipe_type": "ptq", "description": "two\n  words"},
        "quantize": {"algorithm": algorithm, "quant_cfg": [entry]},
    }
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_presets_library_and_paths_are_found(tmp_path: Path) -> None:
    assert load_recipe("nvfp4_four_over_six", PRESETS).name == "nvfp4_four_over_six"
    assert load_recipe("nvfp4_four_over_six.yaml", PRESETS).name == "nvfp4_four_over_six"
    assert load_recipe(ULTRA, PRESETS).name == ULTRA
    assert load_recipe(f"{ULTRA}.yaml", PRESETS).name == ULTRA
    assert load_recipe(f"huggingface/{ULTRA}", PRESETS).name == ULTRA
    path = write(tmp_path)
    recipe = load_recipe(path, PRESETS)
    assert (recipe.name, recipe.description) == (str(path), "two words")
    assert recipe.entries[0].attributes == ({"num_bits": (4, 3)},)


def test_loading_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    load_recipe("fp8", PRESETS)
    assert capsys.readouterr().out == ""


def test_names_are_listed_without_parts_and_other_kinds() -> None:
    assert "nvfp4_four_over_six" in preset_names(PRESETS)
    names = library_names()
    assert ULTRA in names
    assert not [name for name in names if "disabled_quantizers" in name or "auto_" in name]


def test_unknown_name_shows_what_is_near() -> None:
    with pytest.raises(
        RecipeError, match=r"recipe: found nvfp4_four_oversix; .*nvfp4_four_over_six"
    ):
        load_recipe("nvfp4_four_oversix", PRESETS)


def test_not_a_ptq_recipe() -> None:
    with pytest.raises(RecipeError, match="found a recipe of type auto_quantize; only PTQ"):
        load_recipe("general/auto_quantize/nvfp4_fp8_at_5p4bits", PRESETS)
    with pytest.raises(RecipeError, match="does not take it as a PTQ recipe"):
        load_recipe("general/distillation/dmd2_qwen_image", PRESETS)


def test_broken_file_is_a_recipe_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("metadata: [")
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(path, PRESETS)
    with pytest.raises(RecipeError, match="num_bitz"):
        load_recipe(write(tmp_path, cfg={"num_bitz": 4}), PRESETS)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("awq_lite", r"algorithm \(method\): found awq_lite; not supported; supported are NVFP4"),
        ({"method": "smoothquant", "alpha": 0.5}, "found smoothquant"),
        ({"method": "gptq"}, "found gptq"),
        ({"method": "local_hessian"}, "found local_hessian"),
        (None, "found no calibration"),
        (["max", "mse"], "found .*max.*mse"),
        (
            {"method": "max", "moe_calib_experts_ratio": 0.5},
            r"\(moe_calib_experts_ratio\): found 0.5",
        ),
        ({"method": "max", "sync_expert_weight_amax": True}, "sync_expert_weight_amax"),
        (
            {"method": "max", "shared_states": {"weight_global_amax": {"patterns": []}}},
            "shared_states",
        ),
        (
            {"method": "max", "layerwise": {"get_qdq_activations_from_prev_layer": True}},
            "get_qdq_activations_from_prev_layer",
        ),
        ({"method": "mse", "start_multiplier": 2.0, "stop_multiplier": 1.0}, r"\(2.0, 1.0, 0.1\)"),
        ({"method": "max", "typo": 1}, "typo"),
    ],
)
def test_algorithms_are_refused_by_name(tmp_path: Path, algorithm: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, algorithm), PRESETS)


@pytest.mark.parametrize(
    "options",
    [
        {"layerwise": {"enable": True, "calib_mutates_weights": False, "checkpoint_dir": "x"}},
        {"skip_forward_without_activation_calib": True},
        {"distributed_sync": False},
    ],
)
def test_options_about_how_it_runs_have_no_effect(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = load_recipe(write(tmp_path), PRESETS)
    found = load_recipe(write(tmp_path, {"method": "max", **options}), PRESETS)
    assert found.digest == expected.digest


def test_attributes_without_effect_do_not_change_the_digest(tmp_path: Path) -> None:
    expected = load_recipe(write(tmp_path), PRESETS)
    cfg = {"num_bits": "e4m3", "effective_bits": 8, "axis": None, "rotate": {"enable": False}}
    assert load_recipe(write(tmp_path, cfg=cfg), PRESETS).digest == expected.digest
    other = load_recipe(write(tmp_path, cfg={"num_bits": "e4m3", "axis": 0}), PRESETS)
    assert other.digest != expected.digest
