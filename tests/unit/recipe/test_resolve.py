"""Resolution without Model Optimizer: recipes are built from entries; every refusal is named."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.architecture import Architecture, LayerType, Role, TensorSpec, expected_tensors
from pipeline.errors import RecipeError
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.recipe import KVFormat, ModuleFormat, ModuleInfo, Recipe, modules_of, resolve
from pipeline.recipe.records import Algorithm, Entry

FP8 = {"num_bits": (4, 3)}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
STATIC = {"num_bits": (2, 1), "block_sizes": NVFP4["block_sizes"] | {"type": "static"}}
FOUR_OVER_SIX = {
    "num_bits": (2, 1),
    "block_sizes": STATIC["block_sizes"] | {"four_over_six": 1},
}
MAX = Algorithm("max")
SWEEP = Algorithm("mse", fp8_scale_sweep=True)
TWO = Algorithm("mse", multipliers=(1.0, 1.5))
MANY = Algorithm("mse", multipliers=(0.25, 0.5, 1.0))
EXPERTS = [("*experts.*weight_quantizer", STATIC), ("*experts.*input_quantizer", NVFP4)]

ARCHITECTURE = Architecture(
    hidden_size=32,
    vocab_size=64,
    layers=(
        LayerType.mamba,
        LayerType.moe,
        LayerType.attention,
        LayerType.mlp,
        LayerType.attention,
    ),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_latent_size=16,
    moe_shared_expert_intermediate_size=32,
    intermediate_size=32,
)


def recipe_of(entries: Sequence[tuple[Any, ...]], algorithm: Algorithm = MAX) -> Recipe:
    listed = [Entry(0, "*", False)]
    for pattern, what, *parent in entries:
        attributes = () if isinstance(what, bool) else what if isinstance(what, tuple) else (what,)
        enable = what if isinstance(what, bool) else True
        listed.append(Entry(len(listed), pattern, enable, attributes, *parent))
    return Recipe("mine", "", algorithm, tuple(listed))


def resolved(entries: Sequence[tuple[Any, ...]], algorithm: Algorithm = MAX) -> Any:
    return resolve(recipe_of(entries, algorithm), modules_of(expected_tensors(ARCHITECTURE)))


def test_modules_are_those_that_model_optimizer_wraps() -> None:
    modules = {module.name: module for module in modules_of(expected_tensors(ARCHITECTURE))}
    names = {re.sub(r"layers\.\d+", "layers.N", name) for name in modules}
    assert {name for name in names if "experts." not in name} == {
        "backbone.embeddings",
        "lm_head",
        *(f"backbone.layers.N.mixer.{name}_proj" for name in ("in", "out", "q", "k", "v", "o")),
        *(f"backbone.layers.N.mixer.{name}_proj" for name in ("up", "down")),
        "backbone.layers.N.mixer.fc1_latent_proj",
        "backbone.layers.N.mixer.fc2_latent_proj",
        "backbone.layers.N.mixer.conv1d",
    }
    expert = modules["backbone.layers.1.mixer.experts.3.down_proj"]
    assert expert == ModuleInfo(expert.name, Role.routed_expert, layer=1, expert=3)
    assert sum(module.expert is not None for module in modules.values()) == 4 * 2


def test_a_tied_head_is_still_a_module_of_its_own() -> None:
    tied = dataclasses.replace(ARCHITECTURE, tie_word_embeddings=True)
    assert "lm_head" in {module.name for module in modules_of(expected_tensors(tied))}


def test_mtp_is_never_a_module() -> None:
    spec = TensorSpec("mtp.layers.1.mixer.experts.0.up_proj.weight", (32, 16), Role.mtp)
    assert modules_of([spec]) == []


@pytest.mark.parametrize(
    ("attributes", "algorithm", "method"),
    [
        (STATIC, MAX, WeightMethod.max),
        (NVFP4, MAX, WeightMethod.max_dynamic),
        (STATIC, SWEEP, WeightMethod.mse),
        (NVFP4, SWEEP, WeightMethod.max_dynamic),
        (FOUR_OVER_SIX, TWO, WeightMethod.four_over_six),
    ],
)
def test_weight_method_follows_scaling_and_algorithm(
    attributes: Any, algorithm: Algorithm, method: WeightMethod
) -> None:
    found = resolved([("*mixer.experts.*weight_quantizer", attributes)], algorithm)
    expert = found.formats["backbone.layers.1.mixer.experts.0.up_proj"]
    assert expert == ModuleFormat(Format.nvfp4, method)
    assert not found.needs_forward


def test_fp8_takes_multipliers_under_mse_and_none_under_the_sweep() -> None:
    entries = [("*in_proj*weight_quantizer", FP8), ("*in_proj*input_quantizer", FP8)]
    name = "backbone.layers.0.mixer.in_proj"
    for algorithm, multipliers in ((MANY, MANY.multipliers), (SWEEP, ()), (MAX, ())):
        found = resolved(entries, algorithm)
        assert found.formats[name] == ModuleFormat(Format.fp8, None, multipliers, Format.fp8)
        assert found.needs_forward


def test_constant_amax_needs_no_forward() -> None:
    found = resolved(
        [
            EXPERTS[0],
            ("*experts.*input_quantizer", NVFP4 | {"constant_amax": 2688.0}),
            ("*[kv]_bmm_quantizer", FP8 | {"use_constant_amax": True}),
        ]
    )
    expert = found.formats["backbone.layers.1.mixer.experts.0.up_proj"]
    assert (expert.input_format, expert.constant_input_amax) == (Format.nvfp4, 2688.0)
    assert found.kv == {2: KVFormat(448.0), 4: KVFormat(448.0)}
    assert not found.needs_forward
    calibrated = resolved([EXPERTS[0], ("*[kv]_bmm_quantizer", FP8)])
    assert calibrated.kv == {2: KVFormat(None), 4: KVFormat(None)}
    assert calibrated.needs_forward


def test_patterns_that_fit_nothing_are_listed_once_and_those_about_mtp_are_not() -> None:
    found = resolved([*EXPERTS, ("*router*", False), ("mtp.*", False), ("*router*", False)])
    assert found.unmatched_patterns == ["*router*"]


def test_names_of_the_checkpoint_are_understood_where_transformers_has_none() -> None:
    one_by_one = [
        ("backbone.layers.1.mixer.experts.?.*_proj.weight_quantizer", STATIC),
        ("*.experts.*.input_quantizer", NVFP4),
    ]
    by_checkpoint, by_transformers = resolved(one_by_one), resolved([*EXPERTS])
    assert by_checkpoint.unmatched_patterns == []
    names = [name for name in by_transformers.formats if ".experts." in name]
    for name in names:
        assert by_checkpoint.formats[name] == by_transformers.formats[name]


KINDS = "*in_proj*weight_quantizer"
REFUSALS: list[tuple[list[tuple[Any, ...]], Algorithm, str]] = [
    (
        [(KINDS, {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}})],
        MAX,
        r"recipe mine, entry 1 \('\*in_proj\*weight_quantizer'\): found INT4 in blocks of 128 for "
        r"backbone\.layers\.0\.mixer\.in_proj\.weight_quantizer; not supported; supported are",
    ),
    ([(KINDS, {"num_bits": 8, "axis": 0})], MAX, r"INT8 per channel \(axis 0\)"),
    ([(KINDS, FP8 | {"axis": 0})], MAX, r"FP8 per channel \(axis 0\)"),
    ([(KINDS, FP8 | {"block_sizes": {-1: 128, -2: 128}})], MAX, "FP8 in blocks of 128x128"),
    (
        [(KINDS, {"num_bits": (2, 1), "block_sizes": NVFP4["block_sizes"] | {-1: 32}})],
        MAX,
        "NVFP4 in blocks of 32",
    ),
    (
        [(KINDS, {"num_bits": (2, 1), "block_sizes": {-1: 32, "scale_bits": (8, 0)}})],
        MAX,
        "MXFP4",
    ),
    ([(KINDS, (STATIC, FP8))], MAX, r"in sequence \(NVFP4 in blocks of 16, then FP8 per tensor\)"),
    ([(KINDS, STATIC | {"rotate": True})], MAX, "NVFP4 in blocks of 16, rotate=True"),
    ([(KINDS, FP8 | {"type": "dynamic"})], MAX, "FP8 per tensor, type=dynamic"),
    ([(KINDS, FP8 | {"calibrator": "histogram"})], MAX, "calibrator=histogram"),
    ([(KINDS, True)], MAX, r"INT8 \(Model Optimizer's default.*begin quant_cfg with"),
    ([(KINDS, FP8)], MAX, r"FP8 weights with BF16 inputs \(W8A16\)"),
    ([("*in_proj*input_quantizer", NVFP4)], MAX, "NVFP4 inputs with BF16 weights"),
    ([(KINDS, STATIC), ("*in_proj*input_quantizer", FP8)], MAX, "NVFP4 weights with FP8 inputs"),
    ([(KINDS, STATIC), ("*in_proj*input_quantizer", STATIC)], MAX, "static block scales"),
    ([(KINDS, STATIC | {"constant_amax": 3.0})], MAX, "a constant amax for a weight"),
    ([(KINDS, FOUR_OVER_SIX)], MAX, "four_over_six weights under algorithm max"),
    ([(KINDS, FOUR_OVER_SIX)], SWEEP, "four_over_six weights under algorithm mse with fp8_scale"),
    ([(KINDS, FOUR_OVER_SIX)], MANY, "under algorithm mse with 3 multipliers from 0.25 to 1"),
    ([(KINDS, STATIC)], TWO, r"static NVFP4 weights \(not four_over_six\)"),
    ([(KINDS, NVFP4)], TWO, r"dynamic NVFP4 weights \(not four_over_six\)"),
    (
        [*EXPERTS, ("*conv1d*", FP8)],
        MAX,
        r"backbone\.layers\.0\.mixer\.conv1d\.\w+_quantizer; conv1d",
    ),
    (
        [*EXPERTS, ("*lm_head*", FP8)],
        MAX,
        r"lm_head\.\w+_quantizer; lm_head keeps the source's bytes",
    ),
    ([*EXPERTS, ("*embed*", FP8)], MAX, "the embedding keeps the source's bytes"),
    ([*EXPERTS, ("*output_quantizer", FP8)], MAX, "output quantizers have no place"),
    ([*EXPERTS, ("*experts.0.*output_quantizer", FP8)], MAX, "output quantizers have no place"),
    ([*EXPERTS, ("*q_bmm_quantizer", FP8)], MAX, r"only keys and values \(k_bmm, v_bmm\)"),
    ([*EXPERTS, ("*[kv]_bmm_quantizer", NVFP4)], MAX, "NVFP4 KV cache"),
    ([*EXPERTS, ("*k_bmm_quantizer", FP8)], MAX, "keys in FP8 and values in BF16"),
    (
        [*EXPERTS, ("*layers.2.*[kv]_bmm_quantizer", FP8)],
        MAX,
        r"differ between attention layers \(BF16 in \[4\]\)",
    ),
    (
        [("*q_proj*t_quantizer", FP8), ("*q_proj.output_quantizer", False)],
        MAX,
        r"recipe mine, backbone\.layers\.2\.mixer: found q_proj FP8, k_proj BF16, v_proj BF16; "
        "servers fuse",
    ),
    (
        [("*[qkv]_proj*t_quantizer", FP8), ("*output_quantizer", False)],
        TWO,
        "FP8 q/k/v under algorithm mse with 2 multipliers from 1 to 1.5",
    ),
    (
        [*EXPERTS, ("*experts.*quantizers.[02]", False)],
        MAX,
        r"NVFP4 inputs with BF16 weights for backbone.layers.1.mixer.experts.0.up_proj",
    ),
    (
        [EXPERTS[0], ("*experts.*quantizers.[02]", False)],
        MAX,
        r"routed experts of layer 1: found BF16 for up_proj/down_proj of experts 0, 2; NVFP4 max "
        r"weight-only for up_proj/down_proj of experts 1, 3; all experts of a layer must",
    ),
    (
        [EXPERTS[0], ("*experts.up_proj*", False)],
        MAX,
        "BF16 for up_proj of experts 0, 1, 2, 3; NVFP4 max weight-only for down_proj",
    ),
    (
        [*EXPERTS, ("*mlp.experts*weight_quantizer", FP8)],
        MAX,
        r"entry 3 \('\*mlp\.experts\*weight_quantizer'\): found FP8 per tensor, which ends on no",
    ),
    ([*EXPERTS, ("*experts*", False)], MAX, "NVFP4 in blocks of 16, which ends on no tensor"),
    ([("*nothing*", FP8)], MAX, "no weight and no KV cache that it quantizes"),
    (
        [*EXPERTS, ("*", False, "nn.Linearr")],
        MAX,
        "parent_class: found nn.Linearr; no module class",
    ),
]


@pytest.mark.parametrize(("entries", "algorithm", "message"), REFUSALS)
def test_refusals_name_recipe_entry_and_module(
    entries: list[tuple[Any, ...]], algorithm: Algorithm, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        resolved(entries, algorithm)
    assert str(caught.value).startswith("recipe mine")


def test_digest_depends_on_the_content_alone() -> None:
    recipe = recipe_of(EXPERTS)
    renamed = dataclasses.replace(recipe, name="other", description="words")
    assert re.fullmatch("[0-9a-f]{64}", recipe.digest)
    assert renamed.digest == recipe.digest
    assert recipe_of(EXPERTS, SWEEP).digest != recipe.digest
    assert recipe_of(EXPERTS[:1]).digest != recipe.digest
    assert recipe.canonical()["quant_cfg"][1]["cfg"][0]["block_sizes"]["-1"] == 16


def test_twenty_thousand_experts_take_seconds() -> None:
    import time

    layers = (LayerType.mamba, LayerType.moe) * 20
    wide = dataclasses.replace(ARCHITECTURE, layers=layers, n_routed_experts=512)
    modules = modules_of(expected_tensors(wide))
    entries = [*EXPERTS, *((f"*.layers.{layer}.mixer.experts.*", False) for layer in (1, 13, 39))]
    start = time.process_time()
    found = resolve(recipe_of(entries), modules)
    assert time.process_time() - start < 5
    kept = [
        name
        for name, kind in found.formats.items()
        if ".experts." in name and not kind.is_quantized
    ]
    assert len(kept) == 3 * 512 * 2


@pytest.mark.parametrize("amax", [float("inf"), float("nan"), 0.0, -1.0, 1e-44])
def test_a_constant_amax_must_have_a_scale(amax: float) -> None:
    inputs = NVFP4 | {"constant_amax": amax}
    entries = [("*experts.*weight_quantizer", STATIC), ("*experts.*input_quantizer", inputs)]
    with pytest.raises(RecipeError, match=f"a constant amax of {re.escape(str(amax))}"):
        resolve(recipe_of(entries), modules_of(expected_tensors(ARCHITECTURE)))
