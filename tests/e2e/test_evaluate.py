"""launch.evaluate on Model Optimizer's own export: figures, layouts, gates, spoiled checkpoints."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import launch.evaluate  # noqa: F401  (imported before forking: once, not per command)
from launch.entry import CONF_DIR
from pipeline.checkpoint.audit import audit
from pipeline.checkpoint.source import open_source
from pipeline.config import Device, EvaluationConfig, ParallelConfig
from pipeline.config_evaluate import EvaluateConfig
from pipeline.evaluate import evaluate
from pipeline.evaluation.fidelity import Head, Measured, measure
from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.streams import Streams
from pipeline.mcore import slots  # noqa: F401  (imported before forking: once, not per rank)
from pipeline.preparation import Place
from pipeline.runtime.collectives import Ranks
from tests.distributed.helpers import RankError, run_ranks
from tests.e2e.harness import GOLDEN, run_job
from tests.e2e.models import edit_config, write_checkpoint, write_token_ids
from tests.e2e.test_commands import command

ROOT = Path(__file__).parents[2]
MIXED, FLAT = "four_over_six", "nvfp4_default-kv_fp8"
CONFIGS = ("config.json", "hf_quant_config.json")
Tensors = dict[str, torch.Tensor]


def copy_export(recipe: str, directory: Path) -> Path:
    """Model Optimizer's export, with its names put right: no sentinel, one entry per projection."""
    directory.mkdir()
    shutil.copyfile(GOLDEN / recipe / "model.safetensors", directory / "model.safetensors")
    for name in CONFIGS:
        value = json.loads((GOLDEN / recipe / name).read_text())
        (directory / name).write_text(json.dumps(with_right_names(value)))
    return directory


def with_right_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: with_right_names(v) for key, v in value.items() for name in right_names(key)}
    if isinstance(value, list):
        items = ((right_names(item) if isinstance(item, str) else [item]) for item in value)
        return [name for names in items for name in names]
    return value


def right_names(name: str) -> list[str]:
    name = name.split("\x00")[0].rstrip(".")
    if not name.endswith(".experts"):
        return [name]
    return [f"{name}.{n}.{part}_proj" for n in range(8) for part in ("up", "down")]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return copy_export(MIXED, tmp_path / "export")


def config_for(export: Path, **options: Any) -> EvaluateConfig:
    parallel = {name: options.pop(name) for name in ("tp", "ep", "etp") if name in options}
    values: dict[str, Any] = {
        "directory": str(export),
        "source": str(GOLDEN / "source"),
        "data": str(GOLDEN / "calibration_ids.npy"),
        "seq_len": 96,
        "parallel": ParallelConfig(**parallel),
        "device": Device.cpu,
        "report": str(export.parent / "report"),
        "timeout_minutes": 1,
    }
    return EvaluateConfig(**{**values, **options})


def run(export: Path, *, world: int = 1, **options: Any) -> tuple[int, dict[str, Any]]:
    """Evaluates on forked ranks; returns the status and evaluation.json."""
    config = config_for(export, **options)

    def job(rank: int) -> int:
        return evaluate(config, CONF_DIR, Place(rank, world, rank))

    statuses = run_ranks(job, world, timeout=120.0)
    assert len(set(statuses)) == 1
    values = json.loads((export.parent / "report" / "evaluation.json").read_text())
    assert values["ok"] is (statuses[0] == 0)
    return statuses[0], values


@functools.cache
def sound(recipe: str, root: Path) -> dict[str, Any]:
    """The figures of an unspoiled export on one rank."""
    folder = root / recipe
    folder.mkdir()
    status, values = run(copy_export(recipe, folder / "export"))
    assert status == 0
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sound")


def spoil(directory: Path, change: Callable[[Tensors], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def by_mode(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {mode["mode"]: mode for mode in values["report"]["modes"]}


def test_a_sound_export_passes(root: Path) -> None:
    values = sound(MIXED, root)
    modes = by_mode(values)
    assert values["report"]["rejected"] == []
    assert [w for w in values["warnings"] if "layer" in w] == []
    assert 0.002 < modes["w4a16"]["kl_mean"] < modes["w4a4"]["kl_mean"] < 0.05
    assert all(0.02 < error < 0.12 for error in values["weight_errors"].values())
    assert len(values["weight_errors"]) == 60
    assert values["report"]["sequences"] == 8
    worse = by_mode(sound(FLAT, root))
    assert worse["w4a4"]["kl_mean"] > 2 * modes["w4a4"]["kl_mean"], "everything is NVFP4 there"


def test_no_figure_shows_what_is_not_computed_again(
    mixed: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers without NVFP4 are the same in both modes."""
    expected, quantized, skipped = sound(MIXED, root), Streams.quantized, mixed.parent / "skipped"

    def compute_all(streams: Streams, *given: Any, **options: bool) -> None:
        if any(options.values()):
            skipped.touch()
        quantized(streams, *given)

    monkeypatch.setattr(Streams, "quantized", compute_all)
    _, values = run(mixed)
    assert skipped.exists()
    assert {**values["report"], "seconds": 0} == {**expected["report"], "seconds": 0}


@pytest.mark.parametrize("recipe", [MIXED, FLAT])
def test_predictions_are_those_of_model_optimizers_fake_quantization(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last position of each sequence, before and after quantization.

    A rounding that falls otherwise moves everything behind it (a change of the first hidden states
    by 1e-4 moves these predictions by a tenth of what quantization costs), so they cannot be equal:
    they are nearer to each other than to BF16 or to W4A16.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(streams: Streams, head: Head, ranks: Ranks) -> Measured:
        hidden = {
            "bf16": [batch.hidden for batch in streams.batches],
            "w4a4": streams.served[ServingMode.w4a4],
            "w4a16": streams.served[ServingMode.w4a16],
        }
        with torch.inference_mode():
            for name, parts in hidden.items():
                last = torch.cat([part[-1] for part in parts])
                kept[name] = head.log_probabilities(last)
        torch.save(kept, tmp_path / "kept.pt")
        return measure(streams, head, ranks)

    monkeypatch.setattr("pipeline.evaluation.in_sweep.measure", keep)
    run(copy_export(recipe, tmp_path / "export"))
    ours = torch.load(tmp_path / "kept.pt")
    theirs = np.load(GOLDEN / recipe / "modelopt.npz")
    before, after = (
        torch.from_numpy(theirs[name]).log_softmax(-1)
        for name in ("ref_logits_last", "quant_logits_last")
    )
    cost = divergence(before, after)
    assert divergence(before, ours["bf16"]) < 1e-6
    assert divergence(before, ours["w4a4"]) == pytest.approx(cost, rel=0.3)
    apart = divergence(after, ours["w4a4"])
    assert apart < 0.4 * cost
    assert apart < 0.7 * divergence(after, ours["w4a16"])


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL of log probabilities."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def test_figures_are_those_that_the_run_itself_measured(tmp_path: Path) -> None:
    data = str(write_token_ids(tmp_path / "ids.npy", 8, 96, vocab_size=256))
    made = run_job(tmp_path / "out", evaluation={"num_sequences": 8, "data": data})
    in_sweep = json.loads((made / "layersweep" / "run.json").read_text())["evaluation"]
    _, values = run(made, data=data)
    from_files = values["report"]
    for name in ("perplexity", "modes", "layers"):
        assert from_files[name] == in_sweep[name], name


@pytest.mark.parametrize(
    ("recipe", "degrees"),
    [(MIXED, {"ep": 2}), (FLAT, {"tp": 2, "ep": 1}), (FLAT, {"etp": 2, "ep": 1})],
    ids=["mixed-ep2", "flat-tp2", "flat-etp2"],
)
def test_two_ranks_find_the_same_figures(
    recipe: str, degrees: dict[str, int], root: Path, tmp_path: Path
) -> None:
    one = sound(recipe, root)
    _, two = run(copy_export(recipe, tmp_path / "export"), world=2, **degrees)
    assert two["weight_errors"] == pytest.approx(one["weight_errors"], rel=1e-12)
    assert two["report"]["perplexity"] == pytest.approx(one["report"]["perplexity"], rel=1e-5)
    ones = by_mode(one)
    for mode, figures in by_mode(two).items():
        for name in ("perplexity", "kl_mean", "top1"):
            assert figures[name] == pytest.approx(ones[mode][name], rel=1e-5), (mode, name)


def test_model_optimizers_export_is_refused_as_it_is(tmp_path: Path) -> None:
    directory = tmp_path / "export"
    shutil.copytree(GOLDEN / MIXED, directory, ignore=shutil.ignore_patterns("*.npz"))
    with pytest.raises(RankError, match=r"AuditError.*\n.*broken names in quantized_layers"):
        run(directory)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({}, "config.json: found"), ({"shape_of_golden": True}, "backbone.embeddings.weight")],
    ids=["other-shape", "other-weights"],
)
def test_another_source_is_refused(
    settings: dict[str, Any], what: str, mixed: Path, tmp_path: Path
) -> None:
    if settings:
        source = Path(shutil.copytree(GOLDEN / "source", tmp_path / "source"))
        spoil(source, lambda tensors: tensors["backbone.embeddings.weight"][3].mul_(2))
    else:
        source = write_checkpoint(tmp_path / "source")
    with pytest.raises(RankError, match="SourceError") as caught:
        run(mixed, source=str(source))
    assert what in str(caught.value)


def test_other_refusals_come_before_any_layer(mixed: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"data": str(tmp_path / "no.npy")}, "DataError"),
        ({"directory": str(tmp_path / "no")}, "must be an existing checkpoint directory"),
        ({"source": str(mixed)}, "already quantized checkpoint"),
        ({"seq_len": 97}, "DataError"),
    ):
        with pytest.raises(RankError, match=message):
            run(mixed, **options)
    edit_config(mixed, quantization_config=None)
    with pytest.raises(RankError, match=r"config\.json has no quantization_config"):
        run(mixed)


def test_missed_gates_are_named(mixed: Path) -> None:
    gates = EvaluationConfig(max_kl=1e-4, min_top1=0.1, group_sequences=0)
    status, values = run(mixed, evaluation=gates)
    assert status == 1
    w4a4, w4a16 = values["report"]["rejected"]
    assert w4a4.startswith("W4A4: max_kl=0.0001, measured 0.0")
    assert w4a16.startswith("W4A16: max_kl=0.0001, measured 0.0")


# ---- spoiled checkpoints


def test_doubled_block_scales_of_one_expert_are_found(mixed: Path) -> None:
    expert = "backbone.layers.4.mixer.experts.3.up_proj"

    def double(tensors: Tensors) -> None:
        name = f"{expert}.weight_scale"
        tensors[name] = (tensors[name].float() * 2).clamp(max=448).to(torch.float8_e4m3fn)

    spoil(mixed, double)
    assert audit(mixed).ok, "its structure is sound"
    status, values = run(mixed)
    assert status == 1
    (found,) = values["report"]["rejected"]
    assert found.startswith(f"layer 4: {expert}.weight is ")
    assert values["weight_errors"][expert] > 0.5


def test_a_scale_that_is_off_by_a_tenth_is_found(mixed: Path) -> None:
    expert, dense = "backbone.layers.1.mixer.experts.2.down_proj", "backbone.layers.0.mixer.in_proj"

    def enlarge(tensors: Tensors) -> None:
        tensors[f"{expert}.weight_scale_2"] *= 1.1
        tensors[f"{dense}.weight_scale"] *= 0.97

    spoil(mixed, enlarge)
    assert audit(mixed).ok, "its structure is sound"
    status, values = run(mixed)
    assert status == 1
    first, second = sorted(values["report"]["rejected"])
    assert first.startswith(f"layer 0: {dense}.weight is 0.9")
    assert second.startswith(f"layer 1: {expert}.weight is 1.")
    assert second.endswith("times the source's: a scale is wrong")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("backbone.layers.0.mixer.conv1d.weight", lambda x: x.neg()),
        ("backbone.layers.0.mixer.A_log", lambda x: x * 1.25),
        ("backbone.layers.1.mixer.gate.weight", lambda x: x.flip(0)),
        ("backbone.layers.1.mixer.gate.e_score_correction_bias", lambda x: x + 1),
        ("backbone.layers.1.norm.weight", lambda x: x * 1.5),
    ],
    ids=lambda value: value.rpartition("mixer.")[2] if isinstance(value, str) else "",
)
def test_a_changed_tensor_that_is_not_quantized_is_found(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], mixed: Path
) -> None:
    spoil(mixed, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    status, values = run(mixed)
    assert status == 1
    assert values["report"]["rejected"] == [
        f"layer {name.split('.')[2]}: {name} is not quantized, and not the source's"
    ]


def test_a_layer_that_gives_no_numbers_is_named(mixed: Path) -> None:
    name = "backbone.layers.1.norm.weight"
    spoil(mixed, lambda tensors: tensors[name].fill_(float("nan")))
    status, values = run(mixed)
    assert status == 1
    assert any(text.startswith(f"layer 1: {name}") for text in values["report"]["rejected"])
    assert any(text.startswith("layer 1 (moe): its error alone") for text in values["warnings"])


def test_swapped_experts_are_found(mixed: Path) -> None:
    prefix = "backbone.layers.6.mixer.experts"

    def swap(tensors: Tensors) -> None:
        for part in ("weight", "weight_scale", "weight_scale_2"):
            one, other = (f"{prefix}.{n}.down_proj.{part}" for n in (1, 5))
            tensors[one], tensors[other] = tensors[other], tensors[one]

    spoil(mixed, swap)
    assert audit(mixed).ok, "its structure is sound"
    checked = audit(mixed, source=open_source(GOLDEN / "source"))
    assert {
        p.split(": ")[1].split(".weight is")[0]
        for p in checked.problems
        if p.startswith("relative")
    } == {
        f"{prefix}.1.down_proj",
        f"{prefix}.5.down_proj",
    }
    status, values = run(mixed)
    assert status == 1
    found = values["report"]["rejected"]
    assert sorted(text.split(".weight is ")[0] for text in found) == [
        f"layer 6: {prefix}.1.down_proj",
        f"layer 6: {prefix}.5.down_proj",
    ]


UP, IN_PROJ = "backbone.layers.4.mixer.experts.3.up_proj", "backbone.layers.0.mixer.in_proj"


def swap_rows(tensors: Tensors) -> None:
    for part in ("weight", "weight_scale"):
        rows = tensors[f"{UP}.{part}"].view(torch.uint8)
        rows[[2, 9]] = rows[[9, 2]]


def double_row_scales(tensors: Tensors) -> None:
    scales = tensors[f"{UP}.weight_scale"]
    scales[5] = (scales[5].float() * 2).clamp(max=448).to(scales.dtype)


def zero_block(tensors: Tensors) -> None:
    tensors[f"{UP}.weight"][7, 8:16] = 0


def zero_fp8_row(tensors: Tensors) -> None:
    tensors[f"{IN_PROJ}.weight"].view(torch.uint8)[11] = 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (swap_rows, f"{UP}.weight row "),
        (double_row_scales, f"{UP}.weight row 5 is "),
        (zero_block, f"{UP}.weight row 7, columns 16 to 31 is "),
        (zero_fp8_row, f"{IN_PROJ}.weight row 11 is "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_row_or_block_is_found_by_both_commands(
    change: Callable[[Tensors], object], told: str, mixed: Path
) -> None:
    spoil(mixed, change)
    assert audit(mixed).ok, "its structure is sound"
    checked = audit(mixed, source=open_source(GOLDEN / "source"))
    (problem,) = [p for p in checked.problems if p.startswith("relative errors: ")]
    assert told in problem
    assert "explains at most" in problem
    status, values = run(mixed)
    assert status == 1
    (found,) = values["report"]["rejected"]
    assert f"layer {told.split('.')[2]}: {told}" in found
    assert found.removeprefix(f"layer {told.split('.')[2]}: ") == problem.split(": ", 1)[1]


@pytest.mark.parametrize("recipe", [MIXED, FLAT])
def test_model_optimizers_exports_keep_all_bounds(recipe: str, tmp_path: Path) -> None:
    checked = audit(copy_export(recipe, tmp_path / "export"), source=open_source(GOLDEN / "source"))
    assert not [p for p in checked.problems if p.startswith("relative errors")]


@pytest.mark.parametrize("degrees", [{"tp": 2, "ep": 1}, {"etp": 2, "ep": 1}], ids=["tp2", "etp2"])
def test_a_block_is_named_by_its_place_in_the_whole_tensor(
    degrees: dict[str, int], tmp_path: Path
) -> None:
    module = "backbone.layers.4.mixer."
    module += "experts.3.down_proj" if "etp" in degrees else "shared_experts.down_proj"
    flat = copy_export(FLAT, tmp_path / "export")
    spoil(flat, lambda tensors: tensors[f"{module}.weight"][7, -8:].zero_())
    columns = 2 * load_file(flat / "model.safetensors")[f"{module}.weight"].shape[1]
    _, values = run(flat, world=2, **degrees)
    (found,) = values["report"]["rejected"]
    assert f"{module}.weight row 7, columns {columns - 16} to {columns - 1} is " in found


def test_an_input_scale_that_is_far_too_small_is_found(mixed: Path, root: Path) -> None:
    def shrink(tensors: Tensors) -> None:
        tensors["backbone.layers.2.mixer.in_proj.input_scale"].mul_(0.01)

    spoil(mixed, shrink)
    checked = audit(mixed, source=open_source(GOLDEN / "source"))
    assert not [p for p in checked.problems if "in_proj" in p], "nothing else can see it"
    status, values = run(mixed, evaluation=EvaluationConfig(max_kl=0.05, group_sequences=0))
    assert status == 1
    assert [text.split(":")[0] for text in values["report"]["rejected"]] == ["W4A4", "W4A16"]
    (layer,) = [text for text in values["warnings"] if "its error alone" in text]
    assert layer.startswith("layer 2 (mamba): its error alone is more than 3 times")
    assert layer.endswith("look at its input scales")
    (named,) = [text for text in values["warnings"] if "too small" in text]
    assert "backbone.layers.2.mixer.in_proj.input_scale" in named
    kl = by_mode(sound(MIXED, root))["w4a4"]["kl_mean"]
    assert by_mode(values)["w4a4"]["kl_mean"] > 3 * kl


@pytest.mark.parametrize(("factor", "told"), [(1 / 3, "too small"), (100.0, "too large")])
def test_an_input_scale_that_is_off_is_named(factor: float, told: str, mixed: Path) -> None:
    name = "backbone.layers.2.mixer.in_proj.input_scale"
    spoil(mixed, lambda tensors: tensors[name].mul_(factor))
    _, values = run(mixed)
    (found,) = [text for text in values["warnings"] if "the scale is" in text]
    assert found.startswith("layer 2, in_proj: ")
    assert name in found
    assert told in found


def test_unequal_scales_of_q_k_and_v_are_found(tmp_path: Path) -> None:
    flat = copy_export(FLAT, tmp_path / "export")
    spoil(flat, lambda t: t["backbone.layers.3.mixer.k_proj.weight_scale_2"].mul_(2))
    (problem,) = audit(flat).problems
    assert problem.startswith("fused scales: backbone.layers.3.mixer.qkv_proj: weight_scale_2")
    with pytest.raises(RankError, match=r"layers\.3\.mixer\.qkv_proj: weight_scale_2 differs"):
        run(flat)


# ---- the command


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(mixed: Path, tmp_path: Path) -> None:
    words = (mixed.name, f"source={GOLDEN / 'source'}", "seq_len=96", "device=cpu")
    data = f"data={GOLDEN / 'calibration_ids.npy'}"
    done = command("evaluate", *words, data, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "evaluation passed" in done.stdout
    assert "mean KL, nats per token" in done.stdout
    assert "layer 6 (moe), 7/7" in done.stderr
    done = command(
        "evaluate", *words, data, "output=json", "evaluation.min_top1=0.999", cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    values = json.loads(done.stdout)
    assert values["ok"] is False
    assert "min_top1=0.999" in values["report"]["rejected"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    done = command("evaluate", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "data: found nothing" in done.stderr
