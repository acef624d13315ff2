"""Starts jobs that must be refused, and checks what they say and what they leave.

A refusal before the sweep is raised in this process, whatever the number of ranks: the check
comes before the ranks connect. Those in the sweep run on forked ranks.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.errors import (
    LayersweepError,
    NumericsError,
)
from pipeline.recipe import load_recipe
from tests.distributed.helpers import RankError, run_ranks
from tests.e2e.harness import golden_config, run_job
from tests.e2e.models import (
    digest_directory,
    edit_tensors,
    write_token_ids,
)

EVERYTHING = "general/ptq/nvfp4_default-kv_fp8"
WEIGHT_ONLY = "nvfp4_weight_only"
SIZE = {"num_sequences": 4, "seq_len": 32, "loss_sequences": 1}
EXPERT = "backbone.layers.1.mixer.experts"


def refuse(
    kind: type[LayersweepError],
    source: Path | str,
    *,
    world: int = 1,
    what: str = "",
    value: str = "",
    rule: str = "",
    remedy: str = "",
    **options: Any,
) -> LayersweepError:
    """Starts a job that must be refused before the sweep; checks the message and the traces."""
    place = Path(source).parent
    output = Path(options.pop("output", place / "deep" / "out"))
    before = digest_directory(place)
    if "data" not in options:
        options["data"] = str(write_token_ids(place / "ids.npy", 4, 32))
        before = digest_directory(place)
    options = {"recipe": WEIGHT_ONLY, "calibration": SIZE, **options}
    config = golden_config(output, checkpoint=str(source), **options)
    with pytest.raises(LayersweepError) as caught:
        calibrate(config, CONF_DIR, Place(0, world, 0), "")
    error = caught.value
    text = str(error)
    assert type(error) is kind, text
    for expected, part in (
        (what, error.what),
        (value, str(error.value)),
        (rule, error.rule),
        (remedy, error.remedy),
    ):
        assert expected in part, text
        assert part, f"a part of the message is empty: {text}"
        assert part in text
    assert digest_directory(place) == before, "the refused job left or changed files"
    assert not list(place.rglob("*.partial"))
    return error


def write_recipe(directory: Path, *entries: str) -> str:
    """A recipe of the given entries after everything was switched off."""
    path = directory / "recipe.yaml"
    lines = [
        "imports: {nvfp4: configs/numerics/nvfp4_static, fp8: configs/numerics/fp8}",
        "metadata: {recipe_type: ptq, description: made for a test}",
        "quantize:",
        "  algorithm: max",
        "  quant_cfg:",
        "    - {quantizer_name: '*', enable: false}",
        *(f"    - {{{entry}}}" for entry in entries),
    ]
    path.write_text("\n".join(lines))
    return str(path)


def refuse_in_sweep(
    source: Path, *fragments: str, rank: int | None = None, world: int = 1, **options: Any
) -> str:
    """Runs a job on forked ranks that one of them must refuse; returns what that rank said."""
    place = source.parent
    before = digest_directory(source)
    options = {"recipe": EVERYTHING, "calibration": SIZE, **options}
    with pytest.raises(RankError) as caught:
        run_job(
            place / "out",
            world=world,
            checkpoint=str(source),
            data=str(write_token_ids(place / "ids.npy", 4, 32)),
            **{"unobserved_input_scale": 1.0, **options},
        )
    text = caught.value.report.strip().splitlines()[-1]
    assert text.startswith("pipeline.errors.NumericsError: "), caught.value.report
    for fragment in fragments:
        assert fragment in text, text
    assert "To mend it" in text
    if rank is not None:
        assert f"(rank {rank})" in text
        assert caught.value.rank == rank
    assert not (place / "out").exists()
    assert digest_directory(source) == before
    return text


def spoil(source: Path, name: str, value: float) -> None:
    """Puts one bad number into the middle of a tensor."""
    tensor = load_file(source / "model.safetensors")[name]
    tensor.view(-1)[tensor.numel() // 2] = value
    edit_tensors(source, **{name: tensor})


def errors_of_all_ranks(source: Path, world: int, **options: Any) -> list[str]:
    """What every rank of a job says; all of them must refuse it."""
    place = source.parent
    if "data" not in options:
        options["data"] = str(write_token_ids(place / "ids.npy", 4, 32))
    options = {"calibration": SIZE, "unobserved_input_scale": 1.0, **options}
    config = golden_config(place / "out", checkpoint=str(source), **options)
    load_recipe(config.recipe, CONF_DIR / "recipe")  # imports Model Optimizer before forking

    def job(rank: int) -> str:
        with pytest.raises(NumericsError) as caught:
            calibrate(config, CONF_DIR, Place(rank, world, rank), "")
        return str(caught.value)

    return run_ranks(job, world)
