"""What a run says that quantization costs: on its own held-out text, whatever the layout.

The golden model is random, so that the figures are large; they are held against each other.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.entry import CONF_DIR
from pipeline.recipe import load_recipe
from tests.distributed.helpers import RankError
from tests.e2e.harness import GOLDEN, read_checkpoint, run_job
from tests.e2e.models import write_token_ids
from tests.e2e.restarts import Fault, Run
from tests.e2e.test_commands import GOLDEN_JOB, command

VOCAB, SEQ_LEN = 256, 96
EVERYTHING = "general/ptq/nvfp4_default-kv_fp8"
MODES = ("w4a4", "w4a16")
Values = dict[str, Any]


def evaluation_of(directory: Path) -> Values:
    values = json.loads((directory / "layersweep" / "run.json").read_text())["evaluation"]
    assert isinstance(values, dict)
    return values


def figures(directory: Path) -> Values:
    """What was measured, without what differs between equal runs."""
    return {name: value for name, value in evaluation_of(directory).items() if name != "seconds"}


def kl_of(values: Values, layer: int, group: str) -> float:
    (found,) = [g for g in values["groups"] if (g["layer"], g["group"]) == (layer, group)]
    return float(found["kl_mean"])


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """Three sequences: one is missing on the second of two replicas."""
    load_recipe(EVERYTHING, CONF_DIR / "recipe")  # imports Model Optimizer before forking
    data = write_token_ids(tmp_path_factory.mktemp("text") / "ids.npy", 3, SEQ_LEN, VOCAB)
    size = {"num_sequences": 3, "group_sequences": 3, "group_seq_len": SEQ_LEN}
    return {"data": str(data), **size}


@pytest.fixture(scope="module")
def whole(asked: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, everything quantized."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return run_job(output, recipe=EVERYTHING, evaluation=asked)


def test_the_figures_hang_together(whole: Path, asked: Values) -> None:
    found = evaluation_of(whole)
    assert (found["sequences"], found["seq_len"]) == (3, SEQ_LEN)
    assert found["group_tokens"] == 3 * SEQ_LEN
    assert found["data"] == asked["data"]
    assert "float32" in found["arithmetic"]
    assert found["rejected"] == []
    w4a4, w4a16 = found["modes"]
    assert (w4a4["mode"], w4a16["mode"]) == MODES
    assert w4a4["kl_mean"] > w4a16["kl_mean"] > 0, "16-bit inputs cost less"
    assert w4a4["clipped"] > 0
    for mode in (w4a4, w4a16):
        assert mode["kl_p99"] > mode["kl_mean"]
        assert 0 < mode["top1"] < 1
        assert mode["perplexity"] != found["perplexity"]
    types = ["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"]
    assert [layer["layer_type"] for layer in found["layers"]] == types
    for layer in found["layers"]:
        for mode in MODES:
            assert 0 < layer["alone"][mode] < 1
            more = layer["accumulated"][mode] / layer["alone"][mode]
            assert more == pytest.approx(1) if layer["layer"] == 0 else more > 1
    assert found["layers"][0]["alone"]["w4a4"] > found["layers"][0]["alone"]["w4a16"]
    sizes = {"mamba": 2, "moe": 3, "attention": 3}
    assert len(found["groups"]) == sum(sizes[kind] for kind in types)
    order = [group["kl_mean"] for group in found["groups"]]
    assert order == sorted(order, reverse=True)
    assert 0 < order[-1] < order[0] < w4a4["kl_mean"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "rel"),
    [
        ({"world": 2, "ep": 2}, 1e-5),
        ({"world": 2, "ep": 1}, 1e-5),
        ({"world": 2, "tp": 2, "ep": 1}, 1e-2),
        ({"world": 4, "tp": 2, "etp": 2, "ep": 2}, 1e-2),
    ],
    ids=["ep2", "dp2", "tp2", "tp2-etp2-ep2"],
)
def test_every_layout_measures_the_same(
    layout: dict[str, int], rel: float, whole: Path, asked: Values, tmp_path: Path
) -> None:
    """Three sequences on two replicas: padding does not count.

    TP adds up in another order, and a last bit decides some NVFP4 codes of the inputs: of this
    random model such a code moves what lies behind it by up to 3e-3 (`rel`), in W4A4 only.
    """
    run_job(tmp_path / "out", recipe=EVERYTHING, evaluation=asked, **layout)
    ours, theirs = evaluation_of(tmp_path / "out"), evaluation_of(whole)
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-6)
    for mine, other in zip(ours["modes"], theirs["modes"], strict=True):
        assert mine["mode"] == other["mode"]
        near = rel if mine["mode"] == "w4a4" else 1e-5
        for name in ("perplexity", "kl_mean", "kl_p99"):
            assert mine[name] == pytest.approx(other[name], rel=near), (mine["mode"], name)
        assert mine["top1"] == pytest.approx(other["top1"], abs=2 * near)  # of 285 positions
    for mine, other in zip(ours["layers"], theirs["layers"], strict=True):
        assert mine["alone"] == pytest.approx(other["alone"], rel=1e-5), mine["layer"]
        assert mine["accumulated"] == pytest.approx(other["accumulated"], rel=rel), mine["layer"]
        assert mine["accumulated"]["w4a16"] == pytest.approx(
            other["accumulated"]["w4a16"], rel=1e-5
        )
    assert ours["group_tokens"] == theirs["group_tokens"]
    for group in theirs["groups"]:
        layer, name = group["layer"], group["group"]
        assert kl_of(ours, layer, name) == pytest.approx(group["kl_mean"], rel=1e-3), group


def write_recipe(path: Path, *patterns: str) -> Path:
    """`EVERYTHING`, of which only the quantizers that fit these patterns stay on."""
    units = ("base_disable_all", "w4a4_nvfp4_nvfp4", "kv_fp8", "default_disabled_quantizers")
    entries: list[Values] = [{"$import": unit} for unit in units]
    entries.append({"quantizer_name": "*", "enable": False})
    entries += [{"quantizer_name": pattern, "enable": True} for pattern in patterns]
    content = {
        "imports": {unit: f"configs/ptq/units/{unit}" for unit in units},
        "metadata": {"recipe_type": "ptq", "description": "one group"},
        "quantize": {"algorithm": "max", "quant_cfg": entries},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(("layer", "group"), [(0, "in_proj"), (1, "routed_experts"), (3, "qkv")])
def test_a_group_s_stream_is_what_a_recipe_of_that_group_measures(
    layer: int, group: str, whole: Path, asked: Values, tmp_path: Path
) -> None:
    values = evaluation_of(whole)
    (told,) = [g for g in values["groups"] if (g["layer"], g["group"]) == (layer, group)]
    patterns = [f"{told['pattern']}{part}_quantizer" for part in ("weight", "input")]
    recipe = write_recipe(tmp_path / "one.yaml", *patterns)
    run_job(tmp_path / "out", recipe=str(recipe), evaluation=asked)
    alone = evaluation_of(tmp_path / "out")
    assert [(g["layer"], g["group"]) for g in alone["groups"]] == [(layer, group)]
    (w4a4, _) = alone["modes"]
    assert w4a4["kl_mean"] == pytest.approx(told["kl_mean"], rel=1e-4)
    assert kl_of(alone, layer, group) == pytest.approx(told["kl_mean"], rel=1e-6)
    errors = [layer["accumulated"]["w4a4"] for layer in alone["layers"]]
    assert not any(errors[:layer])
    assert all(errors[layer:])
    assert [bool(x["alone"]["w4a4"]) for x in alone["layers"]] == [n == layer for n in range(7)]


def test_bits_that_a_group_would_add_are_those_of_the_checkpoint(
    whole: Path, asked: Values, tmp_path: Path
) -> None:
    """Leaving the routed experts of a layer in BF16, in the plan's own figure."""
    run = json.loads((whole / "layersweep" / "run.json").read_text())
    groups = run["evaluation"]["groups"]
    (told,) = [g for g in groups if (g["layer"], g["group"]) == (1, "routed_experts")]
    path = write_recipe(tmp_path / "rest.yaml")
    content = yaml.safe_load(path.read_text())
    entries = content["quantize"]["quant_cfg"]
    entries[-1] = {"quantizer_name": told["pattern"], "enable": False}
    path.write_text(yaml.safe_dump(content))
    done = command("plan", f"checkpoint={GOLDEN / 'source'}", f"recipe={path}", "output=json")
    more = json.loads(done.stdout)["effective_bits"] - run["effective_bits"]
    # The plan counts 4 bytes of scale for each tensor too: 16 small ones here.
    assert told["extra_bits_bf16"] == pytest.approx(more, rel=0.01)


def test_the_checkpoint_does_not_depend_on_the_evaluation(whole: Path, tmp_path: Path) -> None:
    plain = run_job(tmp_path / "plain", recipe=EVERYTHING)
    assert json.loads((plain / "layersweep" / "run.json").read_text())["evaluation"] is None
    assert read_checkpoint(plain) == read_checkpoint(whole)
    for name in ("config.json", "hf_quant_config.json"):
        assert (plain / name).read_bytes() == (whole / name).read_bytes()


def test_rows_that_follow_are_held_out(tmp_path: Path) -> None:
    """Of one file: what is calibrated on comes first, and the rest is evaluated."""
    data = write_token_ids(tmp_path / "ids.npy", 6, SEQ_LEN, VOCAB)
    rest = write_token_ids(tmp_path / "rest.npy", 6, SEQ_LEN, VOCAB)
    np.save(rest, np.load(data)[4:])
    size = {"num_sequences": 4}
    found = []
    for name, text in (("held_out", {}), ("named", {"data": str(rest)})):
        asked = {"num_sequences": 2, "group_sequences": 0, **text}
        run_job(tmp_path / name, data=str(data), calibration=size, evaluation=asked)
        found.append(figures(tmp_path / name))
    assert found[0].pop("data") == f"{data}, what follows the calibration text"
    assert found[1].pop("data") == str(rest)
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [0, 8])
def test_nothing_is_measured_without_a_forward_pass(count: int, tmp_path: Path) -> None:
    """The golden file holds no row beyond those that are calibrated on."""
    output = run_job(
        tmp_path / "out", recipe="nvfp4_weight_only", evaluation={"num_sequences": count}
    )
    report = json.loads((output / "layersweep" / "run.json").read_text())
    assert report["evaluation"] is None
    assert not any("evaluat" in warning for warning in report["warnings"])


def job(asked: Values, *gates: str) -> tuple[str, ...]:
    size = (f"evaluation.data={asked['data']}", "evaluation.num_sequences=2")
    options = ("recipe=nvfp4_routed_only", "allow_bad_loss=true", "output=out")
    return (*GOLDEN_JOB, *size, *options, "evaluation.group_sequences=0", *gates)


def test_a_missed_gate_changes_the_name_and_the_status(asked: Values, tmp_path: Path) -> None:
    missed = job(asked, "evaluation.max_kl=1e-9", "evaluation.min_top1=0.001")
    done = command("calibrate", *missed, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    rejected = tmp_path / "out.rejected"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rejected"]
    assert "out.rejected" in done.stdout.replace("\n", "")
    values = evaluation_of(rejected)
    assert [line.partition(",")[0] for line in values["rejected"]] == [
        "W4A4: max_kl=1e-09",
        "W4A16: max_kl=1e-09",
    ]
    report = json.loads((rejected / "layersweep" / "run.json").read_text())
    assert Path(report["output"]).name == "out.rejected"
    verified = command("verify", rejected, f"source={GOLDEN / 'source'}")
    assert verified.returncode == 0, verified.stdout

    before = {path: path.stat().st_mtime_ns for path in rejected.rglob("*")}
    again = command("calibrate", *job(asked), cwd=tmp_path)
    assert again.returncode == 2
    assert "out.rejected is there" in again.stderr
    assert "Traceback" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in rejected.rglob("*")} == before

    rejected.rename(tmp_path / "seen")
    passed = job(asked, "evaluation.max_kl=1e9", "evaluation.min_top1=0.001")
    done = command("calibrate", *passed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "seen"]
    assert evaluation_of(tmp_path / "out")["rejected"] == []
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "seen")


SMALL = {"num_sequences": 2, "group_sequences": 1, "group_seq_len": 40}


def run_small(output: Path, asked: Values, **changes: Any) -> Values:
    return figures(run_job(output, evaluation=asked | SMALL | changes))


@pytest.fixture(scope="module")
def undisturbed(asked: Values, tmp_path_factory: pytest.TempPathFactory) -> Values:
    """Figures of a run that nobody disturbed."""
    return run_small(tmp_path_factory.mktemp("undisturbed") / "out", asked)


def test_a_run_that_goes_on_measures_the_same(
    asked: Values, undisturbed: Values, tmp_path: Path
) -> None:
    """Layers that are only passed through are quantized with the recorded scalars."""
    run = Run(tmp_path / "out", evaluation=asked | SMALL)
    run.start(Fault("after part", 3))
    for phase in ("before commit", "after commit"):
        run.start(Fault(phase, "evaluation"))
        assert not run.output.exists()
    run.start()
    assert figures(run.output) == undisturbed
    assert undisturbed["group_tokens"] == 40
    assert run.packings() == dict.fromkeys(range(7), 1) | {3: 2}


@pytest.mark.parametrize("change", ["text", "groups"])
def test_an_evaluation_of_something_else_is_not_taken_over(
    change: str, asked: Values, undisturbed: Values, tmp_path: Path
) -> None:
    other = write_token_ids(tmp_path / "other.npy", 3, SEQ_LEN, VOCAB)
    np.save(other, np.flip(np.load(other), axis=1))
    changes = {"data": str(other)} if change == "text" else {"group_seq_len": 24}
    run = Run(tmp_path / "out", evaluation=asked | SMALL)
    run.start(Fault("in audit"))
    run.start(evaluation=asked | SMALL | changes)
    assert figures(run.output) == run_small(tmp_path / "fresh", asked, **changes)
    assert (figures(run.output)["modes"] == undisturbed["modes"]) is (change == "groups")
    assert figures(run.output)["groups"] != undisturbed["groups"]
    assert set(run.packings().values()) == {1}, "no layer is packed again"


def test_a_gate_is_held_against_what_an_earlier_run_measured(asked: Values, tmp_path: Path) -> None:
    run = Run(tmp_path / "out", evaluation=asked | SMALL)
    run.start(Fault("in audit"))
    run.start(evaluation=asked | SMALL | {"max_kl": 1e-9})
    assert not run.output.exists()
    assert len(evaluation_of(tmp_path / "out.rejected")["rejected"]) == 2
    with pytest.raises(RankError, match=r"out\.rejected is there"):
        run.start()
