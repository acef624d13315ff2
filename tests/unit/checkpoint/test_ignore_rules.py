import pytest

from pipeline.checkpoint.ignore_rules import find_hits, is_excluded, to_vllm_name, units_of

M = "backbone.layers.{}.mixer.{}".format


def test_substring_hits_layers_ten_to_nineteen() -> None:
    modules = [M(2, "in_proj"), M(10, "in_proj")]
    assert find_hits(["backbone.layers.1"], modules) == {"backbone.layers.1": M(10, "in_proj")}
    assert find_hits(["backbone.layers.1."], modules) == {}
    assert find_hits(["layers.2.mixer"], modules) == {"layers.2.mixer": M(2, "in_proj")}


def test_globs_and_names_of_vllm() -> None:
    modules = [M(1, "experts.0.up_proj")]
    assert find_hits(["*up_proj"], modules) == {"*up_proj": modules[0]}
    assert find_hits(["model.layers.1.mixer*"], modules) == {"model.layers.1.mixer*": modules[0]}
    assert find_hits(["mtp*", "lm_head", M(1, "shared_experts.up_proj")], modules) == {}
    assert find_hits(["backbone.layers.?.mixer.experts.*"], modules)
    assert find_hits(["mixer.exp*"], modules)  # vLLM also matches `mixer.exp` by substring


def test_units() -> None:
    modules = [M(3, f"{x}_proj") for x in "qkvo"] + [M(1, f"experts.{n}.up_proj") for n in (0, 1)]
    assert units_of(modules) == {
        M(3, "qkv_proj"): [M(3, "q_proj"), M(3, "k_proj"), M(3, "v_proj")],
        M(3, "o_proj"): [M(3, "o_proj")],
        M(1, "experts"): modules[4:],
    }


def test_fused_unit_is_excluded_by_all_of_its_parts() -> None:
    unit = M(3, "qkv_proj")
    parts = [M(3, f"{x}_proj") for x in "qkv"]
    assert is_excluded(unit, parts)
    assert not is_excluded(unit, [M(33, f"{x}_proj") for x in "qkv"])
    with pytest.raises(ValueError, match="q_proj ignored, the others not"):
        is_excluded(unit, parts[:1])
    with pytest.raises(ValueError, match="q_proj, k_proj ignored"):
        is_excluded(unit, parts[:2])


def test_experts_unit_is_excluded_by_any_of_its_members() -> None:
    unit = M(1, "experts")
    assert is_excluded(unit, [M(1, "experts.7.up_proj")])
    assert is_excluded(unit, [M(1, "experts*")])
    assert not is_excluded(unit, [M(1, "shared_experts.up_proj")])
    assert not is_excluded(unit, [M(11, "experts.7.up_proj")])


def test_mapped_names() -> None:
    assert to_vllm_name("backbone.embeddings") == "model.embed_tokens"
    assert to_vllm_name("mtp.layers.0.mixer.A_log") == "mtp.layers.0.mixer.A"
    assert is_excluded("backbone.embeddings", ["embed_tokens"])
    assert is_excluded("mtp.layers.0.mixer.o_proj", ["mtp*"])
