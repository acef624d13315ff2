"""From the option `model=` to a config.json: a shape of conf/model, or any config.json.

In: a name or a path. Out: the parsed config. No weights are looked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import open_source, read_json
from pipeline.config import read_yaml
from pipeline.errors import ConfigError


def read_model_config(model: str, conf_dir: Path) -> dict[str, Any]:
    """The config.json of a known model, or the one at a path.

    Args:
        model: Name of a file in conf/model, the path of a config.json, or a directory with one.
        conf_dir: Directory of the presets (conf/).

    Raises:
        ConfigError: Neither a known name nor a path.
        SourceError: The file is not JSON.
    """
    preset = conf_dir / "model" / f"{model}.yaml"
    if preset.is_file():
        values = read_yaml(preset)
        if "config_of" in values:
            return open_source(str(values["config_of"])).config
        return values
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        known = sorted(file.stem for file in (conf_dir / "model").glob("*.yaml"))
        raise ConfigError(
            "model",
            value=model,
            rule="must be one of " + ", ".join(known) + ", or the path of a config.json",
            remedy="for a checkpoint use checkpoint=DIR",
        )
    return read_json(path, "must be a model's config.json")
