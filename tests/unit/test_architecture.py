"""config.json in both vocabularies, every refusal by name, and the published parameter totals."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.architecture import (
    Architecture,
    LayerType,
    Role,
    TensorSpec,
    expected_tensors,
    layer_tensors,
    mtp_tensors,
)
from pipeline.config import read_yaml
from pipeline.errors import ArchitectureError
from tests.unit.checkpoint.tiny import tiny_config

CONF = Path(__file__).parents[2] / "conf"
M, A, E, F = LayerType.mamba, LayerType.attention, LayerType.moe, LayerType.mlp


def refused(**changes: Any) -> str:
    with pytest.raises(ArchitectureError) as caught:
        Architecture.from_hf_config(tiny_config(**changes))
    return str(caught.value)


def without(*names: str, **changes: Any) -> dict[str, Any]:
    config = tiny_config(**changes)
    return {key: value for key, value in config.items() if key not in names}


def shapes(architecture: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"backbone.layers.{layer}."
    return {s.name.removeprefix(prefix): s.shape for s in layer_tensors(architecture, layer)}


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("layers_block_type", ["mamba", "moe", "attention", "mlp"]),
        ("layers_block_type", ["mamba2", "moe", "full_attention", "mlp"]),
        ("layer_types", ["linear_attention", "moe", "full_attention", "mlp"]),
        ("hybrid_override_pattern", "ME*-"),
    ],
)
def test_every_vocabulary_names_the_same_layers(key: str, names: Any) -> None:
    config = without("hybrid_override_pattern", num_hidden_layers=4)
    assert Architecture.from_hf_config(config | {key: names}).layers == (M, E, A, F)


def test_both_vocabularies_may_stand_side_by_side_if_they_agree() -> None:
    names = ["mamba", "moe", "attention", "mlp"]
    config = tiny_config(
        num_hidden_layers=4, hybrid_override_pattern="ME*-", layers_block_type=names
    )
    assert Architecture.from_hf_config(config).layers == (M, E, A, F)
    message = refused(num_hidden_layers=4, hybrid_override_pattern="ME-*", layers_block_type=names)
    assert "layers_block_type with 4 layers and hybrid_override_pattern with 4 layers" in message
    assert "they must describe the same layers" in message


def test_a_wrong_number_of_layers_is_refused() -> None:
    message = refused(num_hidden_layers=13)
    assert message.startswith("config.json num_hidden_layers: found 13; ")
    assert "hybrid_override_pattern names 12 layers" in message


@pytest.mark.parametrize("names", ["MEX", ["mamba", "rwkv"], 7, [["mamba"]]])
def test_unknown_layer_types_are_refused(names: Any) -> None:
    message = refused(hybrid_override_pattern=names)
    assert message.startswith("config.json hybrid_override_pattern: found ")
    assert "layer types are *, -, E, M, attention" in message


def test_a_config_without_layers_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="one of them must say the type of every layer"):
        Architecture.from_hf_config(without("hybrid_override_pattern"))


@pytest.mark.parametrize("model_type", ["llama", None])
def test_another_family_is_refused(model_type: str | None) -> None:
    message = refused(model_type=model_type)
    assert message.startswith(f"config.json model_type: found {model_type!r}; ")
    assert "nemotron_h" in message


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "mamba_num_heads",
        "mamba_head_dim",
        "ssm_state_size",
        "n_groups",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "intermediate_size",
    ],
)
def test_what_the_layers_need_must_be_there_and_positive(name: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        Architecture.from_hf_config(without(name))
    assert str(caught.value).startswith(f"config.json {name}: found nothing; the layers of this")
    for value in (0, -2, 1.5, "64", True):
        message = refused(**{name: value})
        assert message.startswith(f"config.json {name}: found {value!r}; must be a positive int")


def test_what_no_layer_needs_may_be_absent() -> None:
    config = without(
        "n_routed_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "num_attention_heads",
        hybrid_override_pattern="MM",
        num_hidden_layers=2,
    )
    assert Architecture.from_hf_config(config).layers == (M, M)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("attention_bias", 1, "bool"),
        ("tie_word_embeddings", "yes", "bool"),
        ("layer_norm_epsilon", float("nan"), "float"),
        ("routed_scaling_factor", "2.5", "float"),
        ("routed_scaling_factor", True, "float"),
        ("moe_latent_size", -1, "int"),
        ("chunk_size", 1.0, "int"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(name: str, value: Any, kind: str) -> None:
    message = refused(**{name: value})
    assert message.startswith(f"config.json {name}: found {value!r}; must be a {kind}")


def test_a_latent_width_of_zero_is_refused_or_means_none() -> None:
    try:
        architecture = Architecture.from_hf_config(tiny_config(moe_latent_size=0))
    except ArchitectureError as error:
        assert "moe_latent_size" in str(error)  # noqa: PT017
    else:
        assert "mixer.fc1_latent_proj.weight" not in shapes(architecture, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mlp_hidden_act", "silu"),
        ("mamba_hidden_act", "gelu"),
        ("sliding_window", 4096),
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_router_pre_softmax", True),
        ("time_step_limit", [0.0, 0.1]),
        ("time_step_limit", [0.001, float("inf")]),
        ("time_step_limit", 0.0),
    ],
)
def test_settings_that_would_compute_another_model_are_refused(name: str, value: Any) -> None:
    message = refused(**{name: value})
    assert message.startswith(f"config.json {name}: found {value!r}; only ")
    assert "cannot be calibrated with this version" in message


@pytest.mark.parametrize(
    "limit", [[0.0, float("inf")], (0, float("inf")), [0.0, {"__float__": "Infinity"}], None]
)
def test_an_unlimited_time_step_is_accepted_in_every_spelling(limit: Any) -> None:
    Architecture.from_hf_config(tiny_config(time_step_limit=limit))


def test_router_settings_do_not_matter_without_moe_layers() -> None:
    config = tiny_config(
        hybrid_override_pattern="M*", num_hidden_layers=2, scoring_func="softmax", n_group=0
    )
    assert Architecture.from_hf_config(config).layers == (M, A)


@pytest.mark.parametrize(
    ("changes", "what", "rule"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "num_attention_heads: found 3",
            "must be a multiple of num_key_value_heads=2",
        ),
        ({"mamba_num_heads": 3, "n_groups": 2}, "mamba_num_heads: found 3", "n_groups=2"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok: found 3", "at most n_routed_experts=2"),
        ({"n_group": 0}, "n_group, topk_group: found (0, 1)", "n_group must divide"),
        ({"n_routed_experts": 4, "n_group": 3}, "found (3, 1)", "n_group must divide"),
        ({"topk_group": 2}, "found (1, 2)", "topk_group be 1..n_group"),
        (
            {"n_routed_experts": 4, "n_group": 2, "num_experts_per_tok": 3},
            "found (2, 1)",
            "must hold num_experts_per_tok=3 experts",
        ),
        ({"n_group": 2, "topk_group": 2}, "found (2, 2)", "a group (1 experts) needs two"),
    ],
)
def test_impossible_arithmetic_is_refused(changes: dict[str, Any], what: str, rule: str) -> None:
    message = refused(**changes)
    assert what in message
    assert rule in message


def test_older_spellings_are_read() -> None:
    config = without("n_groups", "conv_kernel", "n_routed_experts")
    config |= {
        "mamba_n_groups": 2,
        "mamba_d_conv": 3,
        "num_local_experts": 5,
        "mamba_conv_bias": False,
        "norm_eps": 1e-6,
    }
    a = Architecture.from_hf_config(config)
    assert (a.n_groups, a.conv_kernel, a.n_routed_experts) == (2, 3, 5)
    assert (a.use_conv_bias, a.layer_norm_epsilon) == (False, 1e-6)


def test_shapes_of_every_kind_of_layer() -> None:
    a = Architecture.from_hf_config(tiny_config(moe_latent_size=48, attention_bias=True))
    # in_proj rows are [z 64, x 64, B 16, C 16, dt 2].
    assert shapes(a, 0) == {
        "norm.weight": (64,),
        "mixer.in_proj.weight": (162, 64),
        "mixer.conv1d.weight": (96, 1, 4),
        "mixer.conv1d.bias": (96,),
        "mixer.A_log": (2,),
        "mixer.D": (2,),
        "mixer.dt_bias": (2,),
        "mixer.norm.weight": (64,),
        "mixer.out_proj.weight": (64, 64),
    }
    assert shapes(a, 3) == {
        "norm.weight": (64,),
        **{f"mixer.{x}_proj.weight": (32 if x in "kv" else 64, 64) for x in "qkvo"},
        **{f"mixer.{x}_proj.bias": (32 if x in "kv" else 64,) for x in "qkvo"},
    }
    assert shapes(a, 1) == {
        "norm.weight": (64,),
        "mixer.gate.weight": (2, 64),
        "mixer.gate.e_score_correction_bias": (2,),
        "mixer.fc1_latent_proj.weight": (48, 64),
        "mixer.fc2_latent_proj.weight": (64, 48),
        "mixer.shared_experts.up_proj.weight": (64, 64),
        "mixer.shared_experts.down_proj.weight": (64, 64),
        **{f"mixer.experts.{e}.up_proj.weight": (64, 48) for e in range(2)},
        **{f"mixer.experts.{e}.down_proj.weight": (48, 64) for e in range(2)},
    }
    assert shapes(a, 6) == {
        "norm.weight": (64,),
        "mixer.up_proj.weight": (64, 64),
        "mixer.down_proj.weight": (64, 64),
    }


def test_tied_embeddings_have_no_head() -> None:
    names = [s.name for s in expected_tensors(Architecture.from_hf_config(tiny_config()))]
    assert names[0] == "backbone.embeddings.weight"
    assert names[-2:] == ["backbone.norm_f.weight", "lm_head.weight"]
    assert len(names) == len(set(names))
    tied = Architecture.from_hf_config(tiny_config(tie_word_embeddings=True))
    assert [s.name for s in expected_tensors(tied)] == names[:-1]


def test_only_projections_may_be_quantized() -> None:
    specs = expected_tensors(Architecture.from_hf_config(tiny_config(mlp_bias=True)))
    linear = {s.name.split(".")[-2] for s in specs if s.is_linear_weight}
    assert linear == {
        *(f"{x}_proj" for x in ("in", "out", "q", "k", "v", "o", "up", "down")),
        "fc1_latent_proj",
        "fc2_latent_proj",
    }
    kept = {s.name.split(".mixer.")[1] for s in specs if s.keeps_source_dtype}
    assert kept == {"gate.weight", "gate.e_score_correction_bias", "A_log", "D", "dt_bias"}


def test_an_expert_knows_its_index() -> None:
    spec = TensorSpec(
        "backbone.layers.1.mixer.experts.37.down_proj.weight", (4, 8), Role.routed_expert, 1
    )
    assert (spec.expert, spec.module[-9:], spec.parameters) == (37, "down_proj", 32)


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 0}, {}])
def test_mtp_tensors_are_named_only_where_the_config_says_so(changes: dict[str, Any]) -> None:
    specs = mtp_tensors(Architecture.from_hf_config(tiny_config(**changes)))
    if changes:
        assert specs == []
        return
    names = {s.name for s in specs}
    assert {s.role for s in specs} == {Role.mtp}
    assert all(name.startswith("mtp.layers.") for name in names)
    assert "mtp.layers.0.eh_proj.weight" in names
    assert "mtp.layers.1.mixer.experts.1.down_proj.weight" in names
    assert "mtp.layers.1.final_layernorm.weight" in names


def test_parameters_of_nemotron_3_ultra() -> None:
    a = Architecture.from_hf_config(read_yaml(CONF / "model" / "nemotron3_ultra.yaml"))
    assert Counter(a.layers) == {M: 48, E: 48, A: 12}
    totals: Counter[str] = Counter()
    for spec in [*expected_tensors(a), *mtp_tensors(a)]:
        totals[spec.role.value] += spec.parameters
    billions = {role: f"{count / 1e9:.3f}" for role, count in totals.items()}
    attention = totals["attention_qkv"] + totals["attention_out"]
    assert f"{attention / 1e9:.3f}" == "1.661"
    assert f"{totals.total() / 1e9:.2f}" == "560.52"
    assert {role: billions[role] for role in billions if not role.startswith("attention")} == {
        "routed_expert": "515.396",
        "shared_expert": "8.053",
        "latent": "1.611",
        "gate": "0.201",
        "mamba_in": "13.791",
        "mamba_out": "6.442",
        "mamba_other": billions["mamba_other"],
        "norm": billions["norm"],
        "embedding": "1.074",
        "head": "1.074",
        "mtp": "11.216",
    }
    assert float(billions["mamba_other"]) + float(billions["norm"]) < 0.01
