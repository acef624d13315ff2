"""Checks a job before it is queued: everything that costs seconds, and no model and no GPU.

In: the job's options as its own command would have them. Out: nothing, or the refusal that the job
would otherwise bring hours later. Checkpoints and data are not looked for: they may be where only
the nodes see them.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.config import CalibrateConfig, VerifyConfig
from pipeline.config_compare import CompareConfig
from pipeline.config_evaluate import EvaluateConfig
from pipeline.errors import ConfigError
from pipeline.model_config import read_model_config
from pipeline.recipe.load import locate_recipe

JobConfig = CalibrateConfig | EvaluateConfig | VerifyConfig


def check_job(config: JobConfig, conf_dir: Path, world: int) -> None:
    """Checks names and degrees.

    Args:
        config: Of the job.
        conf_dir: Directory of the presets (conf/).
        world: Number of ranks.

    Raises:
        LayersweepError: A recipe or shape that is not there, degrees that do not fit the ranks, or
            no directory to look at.
    """
    if isinstance(config, CalibrateConfig):
        recipes = config.recipes if isinstance(config, CompareConfig) else [config.recipe]
        for recipe in recipes:
            locate_recipe(recipe, conf_dir / "recipe")
        if config.model is not None:
            read_model_config(config.model, conf_dir)
    elif config.directory is None:
        raise ConfigError(
            "directory",
            value="nothing",
            rule="the checkpoint to look at is mandatory",
            remedy="give it as a word of its own, or as directory=DIR",
        )
    if not isinstance(config, VerifyConfig):
        config.parallel.dims(world, experts=0)
