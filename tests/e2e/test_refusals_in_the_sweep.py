"""NaN and Inf in weights and activations, and the loss: refusals while the sweep runs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.errors import (
    LayersweepError,
    NumericsError,
)
from tests.distributed.helpers import RankError
from tests.e2e.harness import golden_config, read_checkpoint, run_job
from tests.e2e.models import (
    edit_tensors,
    write_checkpoint,
    write_token_ids,
)
from tests.e2e.refusals import (
    EVERYTHING,
    EXPERT,
    SIZE,
    WEIGHT_ONLY,
    errors_of_all_ranks,
    refuse_in_sweep,
    spoil,
)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [f"{EXPERT}.5.down_proj.weight", "backbone.layers.3.mixer.up_proj.weight"],
    ids=["expert", "dense"],
)
def test_bad_number_in_a_streamed_weight(name: str, value: float, source: Path) -> None:
    spoil(source, name, value)
    output = source.parent / "out"
    config = golden_config(output, checkpoint=str(source), recipe=WEIGHT_ONLY)
    with pytest.raises(NumericsError) as caught:
        calibrate(config, CONF_DIR, Place(), "")
    assert name in caught.value.what
    assert "rank 0" in caught.value.what
    assert caught.value.value == "NaN or Inf"
    assert caught.value.remedy
    assert not output.exists()


@pytest.mark.parametrize(
    "name",
    ["backbone.embeddings.weight", "backbone.layers.1.norm.weight", "lm_head.weight"],
)
def test_bad_number_in_a_tensor_that_is_only_copied(name: str, source: Path) -> None:
    """A conversion without a forward pass must not publish it either."""
    spoil(source, name, torch.nan)
    config = golden_config(source.parent / "out", checkpoint=str(source), recipe=WEIGHT_ONLY)
    with pytest.raises(LayersweepError, match=re.escape(name)):
        calibrate(config, CONF_DIR, Place(), "")
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize(
    ("layout", "name", "rank"),
    [
        ({"world": 2, "ep": 2}, f"{EXPERT}.5.down_proj.weight", 1),
        ({"world": 2, "ep": 2}, f"{EXPERT}.2.up_proj.weight", 0),
        ({"world": 2, "tp": 2, "recipe": "fp8"}, "backbone.layers.2.mixer.o_proj.weight", None),
        ({"world": 2, "ep": 1}, "backbone.layers.3.mixer.down_proj.weight", None),
        ({"world": 2, "etp": 2}, f"{EXPERT}.5.down_proj.weight", None),
    ],
    ids=["ep2-rank1", "ep2-rank0", "tp2", "dp2", "etp2"],
)
def test_bad_number_in_a_weight_on_two_ranks(
    layout: dict[str, Any], name: str, rank: int | None, source: Path
) -> None:
    spoil(source, name, torch.nan)
    text = refuse_in_sweep(source, name, "NaN or Inf", "corrupt", rank=rank, **layout)
    assert re.search(r"\(rank [01]\)", text)


def test_rank_named_is_the_one_that_holds_the_bad_number(source: Path) -> None:
    name = "backbone.layers.2.mixer.o_proj.weight"
    tensor = load_file(source / "model.safetensors")[name]
    tensor[0, -1] = torch.nan  # K is cut by TP: rank 1 holds the last column
    edit_tensors(source, **{name: tensor})
    options = {"tp": 2, "recipe": "fp8", "calibration": SIZE}
    options["data"] = str(write_token_ids(source.parent / "ids.npy", 4, 32))
    with pytest.raises(RankError) as caught:
        run_job(source.parent / "out", world=2, checkpoint=str(source), **options)
    assert caught.value.rank == 1, "the others only lose their connection"
    assert f"{name} (rank 1): found NaN or Inf" in caught.value.report


@pytest.mark.parametrize(
    "name",
    [
        "backbone.embeddings.weight",
        "backbone.layers.1.norm.weight",
        "backbone.layers.1.mixer.gate.weight",
        "backbone.layers.0.mixer.A_log",
        "backbone.norm_f.weight",
        "lm_head.weight",
    ],
)
def test_bad_number_in_an_unquantized_weight(name: str, source: Path) -> None:
    tensor = load_file(source / "model.safetensors")[name]
    edit_tensors(source, **{name: torch.full_like(tensor, torch.nan)})
    refuse_in_sweep(source, f"{name} (rank 0): found NaN or Inf", "copied")


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, {}), (2, {"tp": 2}), (2, {"ep": 1})],
    ids=["one", "tp2", "dp2"],
)
def test_activations_that_overflow(world: int, layout: dict[str, int], source: Path) -> None:
    name = "backbone.layers.3.mixer.up_proj.weight"
    huge = load_file(source / "model.safetensors")[name] * 1e30  # relu2 squares it
    edit_tensors(source, **{name: huge})
    said = errors_of_all_ranks(source, world, recipe="fp8", **layout)[0]
    for part in ("layer 3", "down_proj", "NaN or Inf", "rank 0", "compute_dtype"):
        assert part in said, said


def test_activations_that_overflow_on_one_rank_only(source: Path) -> None:
    """Under TP, rank 1 holds the last columns of down_proj and so the last of its inputs."""
    name = "backbone.layers.3.mixer.up_proj.weight"
    huge = load_file(source / "model.safetensors")[name]
    huge[-1] *= 1e30
    edit_tensors(source, **{name: huge})
    said = errors_of_all_ranks(source, 2, tp=2, recipe="fp8")[0]
    assert "layer 3" in said, said
    assert "rank 1" in said, said


def test_overflow_beyond_the_sample_of_the_loss(tmp_path: Path) -> None:
    """In the last layer, on a sequence that the loss does not see: only the observers can tell."""
    source = write_checkpoint(tmp_path / "source", hybrid_override_pattern="-")
    tensors = load_file(source / "model.safetensors")
    tensors["backbone.embeddings.weight"][:64] = torch.eye(64)
    tensors["backbone.layers.0.mixer.up_proj.weight"][:, 5] = 1e30  # seen by token 5 alone
    save_file(tensors, source / "model.safetensors")
    ids = np.random.default_rng(0).integers(6, 64, (4, 32))
    ids[3, 10] = 5
    np.save(tmp_path / "ids.npy", ids)
    said = errors_of_all_ranks(source, 1, recipe="fp8", data=str(tmp_path / "ids.npy"))[0]
    for part in ("layer 0", "down_proj", "NaN or Inf", "rank 0"):
        assert part in said, said


def test_output_of_the_last_layer_that_overflows(source: Path) -> None:
    name = "backbone.layers.5.mixer.fc2_latent_proj.weight"
    huge = load_file(source / "model.safetensors")[name] * 2e38
    edit_tensors(source, **{name: huge.clamp(-3e38, 3e38)})
    refuse_in_sweep(source, "loss", "nan")


def test_projection_that_no_token_reached(source: Path) -> None:
    name = "backbone.layers.3.mixer.up_proj.weight"
    edit_tensors(source, **{name: torch.zeros(64, 64).bfloat16()})
    refuse_in_sweep(
        source,
        "backbone.layers.3.mixer.down_proj",
        "only zeros",
        "unobserved_input_scale=VALUE",
        unobserved_input_scale=None,
    )


def test_bad_loss_is_refused_and_can_be_allowed_afterwards(source: Path, tmp_path: Path) -> None:
    refuse_in_sweep(
        source,
        "next-token loss",
        "nats per token",
        "worse than that of token frequencies",
        "allow_bad_loss=true",
        allow_bad_loss=False,
    )
    output = run_job(
        tmp_path / "out",
        checkpoint=str(source),
        recipe=EVERYTHING,
        calibration=SIZE,
        data=str(tmp_path / "ids.npy"),
        unobserved_input_scale=1.0,
    )
    assert read_checkpoint(output)
