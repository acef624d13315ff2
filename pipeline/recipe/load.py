"""Reads a recipe: a preset of ours, one of Model Optimizer's library, or a YAML file.

In: a name or a path. Out: a `Recipe`. All three go through `modelopt.recipe.load_recipe`, so
imports and schema are Model Optimizer's. It is imported on first use only: that takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.recipe.formats import SUPPORTED
from pipeline.recipe.records import Algorithm, Attributes, Entry, Recipe

# Fields of Model Optimizer's QuantizerAttributeConfig that change no exported byte: `enable` is
# the entry's own, the others serve its auto-quantize search, ONNX export and training.
_NO_EFFECT = ("enable", "effective_bits", "trt_high_precision_dtype", "pass_through_bwd")


def load_recipe(name_or_path: str | Path, presets_dir: str | Path) -> Recipe:
    """Loads a recipe by preset name, by name in Model Optimizer's library, or by path.

    Raises:
        RecipeError: Nothing of that name, not a PTQ recipe, not valid, or an algorithm that is
            not supported.
    """
    name, location = locate_recipe(str(name_or_path), Path(presets_dir))
    loaded = _read(name, location)
    if (kind := loaded.recipe_type.value) != "ptq":
        raise RecipeError(
            f"recipe {name}", value=f"a recipe of type {kind}", rule="only PTQ recipes are read"
        )
    return Recipe(
        name=name,
        description=" ".join(str(loaded.description).split()),
        algorithm=_algorithm(name, loaded.quantize.algorithm),
        entries=tuple(
            Entry(index, raw.quantizer_name, raw.enable, _attributes(raw.cfg), raw.parent_class)
            for index, raw in enumerate(loaded.quantize.quant_cfg)
        ),
    )


def preset_names(presets_dir: str | Path) -> list[str]:
    """Names of the presets in a directory."""
    return sorted(path.stem for path in Path(presets_dir).glob("*.yaml"))


def library_names() -> list[str]:
    """Names of the PTQ recipes that Model Optimizer ships, without importing it.

    Those in a folder `ptq` or `qad` that have metadata; the rest of the library is parts of
    recipes and recipes of other kinds.
    """
    root = _library_root()
    if root is None:
        return []
    return sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for path in root.rglob("*.yaml")
        if path.parent.name in ("ptq", "qad")
        and path.relative_to(root).parts[0] != "configs"
        and "recipe_type: ptq" in path.read_text(encoding="utf-8")
    )


def _library_root() -> Path | None:
    spec = importlib.util.find_spec("modelopt_recipes")
    return Path(spec.origin).parent if spec and spec.origin else None


def locate_recipe(name: str, presets_dir: Path) -> tuple[str, Path | str]:
    """The recipe's name, and what Model Optimizer's loader is to be given; it is not imported.

    Raises:
        RecipeError: Nothing of that name.
    """
    stem = name.removesuffix(".yaml").removesuffix(".yml")
    preset = presets_dir / f"{stem}.yaml"
    if "/" not in name and preset.is_file():
        return stem, preset.resolve()
    root = _library_root()
    shipped = stem.removeprefix("huggingface/") if "huggingface/models/" in stem else stem
    path = Path(name).expanduser()
    inside = not path.is_absolute() and ".." not in path.parts
    if inside and root is not None and (root / f"{shipped}.yaml").is_file():
        return shipped, shipped
    if path.exists():
        return name, path.resolve()
    known = preset_names(presets_dir) + library_names()
    near = difflib.get_close_matches(stem, known, n=3, cutoff=0.4)
    raise RecipeError(
        "recipe",
        value=name,
        rule="neither a preset, nor a recipe of Model Optimizer's library, nor a file",
        remedy=(f"did you mean {' or '.join(near)}? " if near else "")
        + f"presets: {', '.join(preset_names(presets_dir)) or 'none'}",
    )


def _read(name: str, location: Path | str) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # optional backends that are not installed
        from modelopt.recipe import load_recipe as load

        try:
            return load(location)
        except Exception as error:  # the loader raises whatever YAML, OmegaConf or pydantic do
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"recipe {name}",
                value=reason,
                rule="Model Optimizer's loader does not take it as a PTQ recipe",
                remedy="see the presets in conf/recipe for the form",
            ) from error


def _attributes(cfg: Any) -> tuple[Attributes, ...]:
    if cfg is None:
        return ()
    quantizers = cfg if isinstance(cfg, list) else [cfg]
    return tuple(_changed(quantizer) for quantizer in quantizers)


def _changed(cfg: Any) -> Attributes:
    values: dict[str, Any] = cfg.model_dump()
    defaults: dict[str, Any] = type(cfg)().model_dump()
    changed = {
        key: value
        for key, value in values.items()
        if key not in _NO_EFFECT and (key == "num_bits" or value != defaults[key])
    }
    rotate = changed.get("rotate")
    if isinstance(rotate, Mapping) and not rotate.get("enable"):
        del changed["rotate"]
    return changed


def _algorithm(name: str, raw: Any) -> Algorithm:
    """Reads `quantize.algorithm`: a string, a mapping or one of either in a list."""
    if isinstance(raw, list) and len(raw) == 1:
        raw = raw[0]
    if hasattr(raw, "model_dump"):
        raw = raw.model_dump(exclude_unset=True)
    values: dict[str, Any] = dict(raw) if isinstance(raw, Mapping) else {"method": raw}
    method = values.get("method")
    if method not in ("max", "mse"):
        raise _refused(name, "method", raw if isinstance(raw, list) else method or "no calibration")
    from modelopt.torch.quantization.config import MaxCalibConfig, MseCalibConfig

    try:
        config: dict[str, Any] = (MaxCalibConfig if method == "max" else MseCalibConfig)(
            **values
        ).model_dump()
    except ValueError as error:
        raise _refused(name, "fields", " ".join(str(error).split())) from error
    # What would change a calibrated value; everything else under `layerwise` is about how Model
    # Optimizer walks the model, `distributed_sync` and `skip_forward...` about when it runs.
    if config["layerwise"].get("get_qdq_activations_from_prev_layer"):
        raise _refused(name, "layerwise.get_qdq_activations_from_prev_layer", True)
    for option in ("moe_calib_experts_ratio", "sync_expert_weight_amax", "shared_states"):
        if config.get(option):
            raise _refused(name, option, config[option])
    if method == "max":
        return Algorithm("max")
    if config["fp8_scale_sweep"]:
        return Algorithm("mse", fp8_scale_sweep=True)
    return Algorithm("mse", multipliers=_multipliers(name, config))


def _multipliers(name: str, config: Mapping[str, Any]) -> tuple[float, ...]:
    """The fp32 candidates of Model Optimizer 0.47 (`calib/mse.py`, MseCalibrator)."""
    import torch

    start, stop, step = (
        config[key] for key in ("start_multiplier", "stop_multiplier", "step_size")
    )
    if None in (start, stop, step) or stop < start:
        raise _refused(name, "start_multiplier, stop_multiplier, step_size", (start, stop, step))
    steps = math.ceil((stop - start) / step) + 1
    return tuple(torch.linspace(start, stop, steps=steps, dtype=torch.float32).tolist())


def _refused(name: str, option: str, value: object) -> RecipeError:
    return RecipeError(
        f"recipe {name}, algorithm ({option})",
        value=value,
        rule=f"not supported; {SUPPORTED}",
        remedy="use method max, or mse with fp8_scale_sweep or with multipliers 1.0 and 1.5",
    )
