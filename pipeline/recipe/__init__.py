"""Recipes: Model Optimizer's YAML and pattern rules in, one format per projection out."""

from pipeline.recipe.load import library_names, load_recipe, preset_names
from pipeline.recipe.records import (
    KVFormat,
    ModuleFormat,
    ModuleInfo,
    Recipe,
    Resolution,
    modules_of,
)
from pipeline.recipe.resolve import resolve

__all__ = [
    "KVFormat",
    "ModuleFormat",
    "ModuleInfo",
    "Recipe",
    "Resolution",
    "library_names",
    "load_recipe",
    "modules_of",
    "preset_names",
    "resolve",
]
