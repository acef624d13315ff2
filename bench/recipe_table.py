"""Writes docs/recipes.md and the table in README.md: what each PTQ recipe is on a Nemotron-H model.

Run from the repository: `python -m bench.recipe_table`. The model has one layer of each kind;
which tensors a recipe reaches does not depend on sizes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from pipeline.architecture import Architecture, LayerType, Role, expected_tensors
from pipeline.errors import RecipeError
from pipeline.recipe import (
    ModuleFormat,
    ModuleInfo,
    Resolution,
    library_names,
    load_recipe,
    modules_of,
    preset_names,
    resolve,
)

REPOSITORY = Path(__file__).parents[1]
PRESETS = REPOSITORY / "conf" / "recipe"
TABLE = REPOSITORY / "docs" / "recipes.md"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- recipe table: begin -->\n", "<!-- recipe table: end -->\n"

COLUMNS = {
    "routed experts": (Role.routed_expert,),
    "shared experts": (Role.shared_expert,),
    "latent": (Role.latent,),
    "Mamba in, out": (Role.mamba_in, Role.mamba_out),
    "q, k, v": (Role.attention_qkv,),
    "o": (Role.attention_out,),
    "MLP": (Role.mlp,),
}

HEADER = """# Recipes

A recipe is a Model Optimizer PTQ recipe: `recipe=` takes the name of a preset in `conf/recipe`, of
a recipe in Model Optimizer's library (`modelopt_recipes`), or the path of such a YAML file. Its
rules are Model Optimizer's: entries apply in order, the last one that matches a quantizer wins, an
entry with `cfg` replaces all attributes, `parent_class` is obeyed.

Patterns apply to the names that Model Optimizer gives the quantizers of transformers'
`NemotronHForCausalLM`, such as `model.layers.0.mixer.in_proj.weight_quantizer` and, experts being
fused, `model.layers.1.mixer.experts.up_proj_weight_quantizer`. An entry that fits none of those is
tried on the checkpoint's own names, `backbone.layers.1.mixer.experts.7.up_proj.weight_quantizer`.

`lm_head`, the embedding, `conv1d`, norms, the router and `mtp.*` keep the source's bytes; a recipe
that quantizes one of the first three is refused. Refused as well: formats that differ within q, k
and v, within the experts of a layer (up and down alike) or between the KV caches of attention
layers; a weight format that ends on no tensor; FP8 weights without FP8 inputs; and any weight
format under an algorithm for which its bytes are not known to be Model Optimizer's.

How to read the tables, made by `bench/recipe_table.py` with Model Optimizer {version} on a model
with Mamba, latent MoE, attention and MLP layers: *4/6* is four-over-six, *sweep* the E4M3 sweep,
*max* scales from the block maximum (*max, dynamic*: Model Optimizer's `type: dynamic` weights,
whose last bit differs), *W4A16* weight-only, *x1 to x1.5* an FP8 weight's amax multiplied by the
candidate of least squared error, *const* a constant scale. Without calibrated scales there is no
forward pass. Tests compare every accepted line with what `mtq.quantize` makes of the transformers
model, and hold every refusal.
"""


def main() -> None:
    """Writes both."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # writes only when asked to run
    TABLE.parent.mkdir(exist_ok=True)
    tables = sections()
    TABLE.write_text(document(tables), encoding="utf-8")
    README.write_text(readme(tables), encoding="utf-8")


def document(tables: dict[str, str]) -> str:
    """The whole of docs/recipes.md."""
    header = HEADER.format(version=importlib.metadata.version("nvidia-modelopt"))
    return header + "".join(f"\n## {title}\n\n{table}" for title, table in tables.items())


def readme(tables: dict[str, str]) -> str:
    """README.md with its table brought up to date."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    library = "\n".join(table for title, table in tables.items() if title != "Presets")
    return f"{before}{BEGIN}{library}{END}{after}"


def sections() -> dict[str, str]:
    """The tables by title."""
    modules = modules_of(expected_tensors(_model()))
    accepted: dict[str, list[str]] = {"Presets": [], "Model Optimizer's library": []}
    refused: list[str] = []
    for title, names in zip(accepted, (preset_names(PRESETS), library_names()), strict=True):
        for name in names:
            try:
                resolution = resolve(load_recipe(name, PRESETS), modules)
            except RecipeError as error:
                rule = error.rule.partition("; supported are")[0]
                refused.append(f"| `{name}` | {_cell(f'{error.value}; {rule}')} |")
            else:
                accepted[title].append(_row(name, resolution, modules))
    head = ["recipe", *COLUMNS, "KV cache", "forward"]
    top = f"| {' | '.join(head)} |\n|{' --- |' * len(head)}\n"
    tables = {title: top + "\n".join(rows) + "\n" for title, rows in accepted.items()}
    tables["Refused"] = "| recipe | refused because |\n| --- | --- |\n" + "\n".join(refused) + "\n"
    return tables


def _row(name: str, resolution: Resolution, modules: Sequence[ModuleInfo]) -> str:
    cells = [f"`{name}`"]
    for roles in COLUMNS.values():
        found = {resolution.formats[m.name] for m in modules if m.role in roles}
        cells.append(", ".join(sorted(_format(module_format) for module_format in found)))
    constants = {layer.constant_amax for layer in resolution.kv.values()}
    cells.append("BF16" if not constants else "FP8" if None in constants else "FP8 const")
    cells.append("yes" if resolution.needs_forward else "no")
    return f"| {' | '.join(cells)} |"


def _format(module_format: ModuleFormat) -> str:
    if not module_format.is_quantized:
        return "BF16"
    method = module_format.weight_method
    names = {"four_over_six": "4/6", "mse": "sweep", "max": "max", "max_dynamic": "max, dynamic"}
    details = [names[method.name]] if method else []
    multipliers = module_format.fp8_multipliers
    if multipliers:
        details.append(f"x{multipliers[0]:g} to x{multipliers[-1]:g}")
    if module_format.input_format is None:
        details.append("W4A16")
    if module_format.constant_input_amax is not None:
        details.append("const input")
    name = module_format.weight_format.name.upper()
    return f"{name} ({', '.join(details)})" if details else name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _model() -> Architecture:
    return Architecture(
        hidden_size=32,
        vocab_size=64,
        layers=(LayerType.mamba, LayerType.moe, LayerType.attention, LayerType.mlp, LayerType.moe),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        n_routed_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_latent_size=16,
        moe_shared_expert_intermediate_size=32,
        intermediate_size=32,
    )


if __name__ == "__main__":
    main()
