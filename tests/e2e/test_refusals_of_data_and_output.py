"""Calibration data and output directories that are refused before the sweep."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.checkpoint.hub import DEMO_DIRECTORY
from pipeline.errors import (
    ConfigError,
    DataError,
    LayoutError,
    NumericsError,
    OutputError,
)
from tests.e2e.harness import golden_config
from tests.e2e.models import (
    digest_directory,
    edit_tensors,
    write_checkpoint,
    write_token_ids,
)
from tests.e2e.refusals import (
    EVERYTHING,
    EXPERT,
    SIZE,
    WEIGHT_ONLY,
    refuse,
)

# --- calibration data


def make_text_source(tmp_path: Path) -> Path:
    """A checkpoint with the demo's tokenizer."""
    vocabulary = json.loads((DEMO_DIRECTORY / "config.json").read_text())["vocab_size"]
    source = write_checkpoint(tmp_path / "source", vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, source)
    return source


def test_too_little_text(tmp_path: Path) -> None:
    source = make_text_source(tmp_path)
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "a short text"}))
    error = refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(data),
        what=str(data),
        value="tokens",
        rule="4 sequences of 32 tokens need 128",
        remedy="add text",
    )
    assert re.search(r"found \d+ tokens", str(error))


def test_tokenizer_is_missing(source: Path) -> None:
    (source / "tokenizer_config.json").unlink()
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data="demo",
        what=f"tokenizer in {source}",
        rule="tokenizer of the checkpoint",
        remedy="tokenizer.json",
    )


def test_no_such_text(tmp_path: Path) -> None:
    source = make_text_source(tmp_path)
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(tmp_path / "nothing.jsonl"),
        what="nothing.jsonl",
        value="no such file",
        remedy="correct the path",
    )


def test_tokenizer_of_another_model(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, source)
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data="demo",
        what="token ids",
        rule="ids 0 to 95",
        remedy="tokenizer that belongs",
    )


def test_token_file_that_is_too_small(source: Path, tmp_path: Path) -> None:
    data = write_token_ids(tmp_path / "small.npy", 3, 32)
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(data),
        value="3 sequences of 32 tokens",
        rule="4 sequences of 32 tokens are needed",
        remedy="calibration.num_sequences",
    )


def test_token_file_without_rows_for_the_evaluation(source: Path, tmp_path: Path) -> None:
    data = write_token_ids(tmp_path / "exact.npy", 4, 32)
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(data),
        evaluation={"num_sequences": 8},
        value="4 sequences of 32 tokens",
        rule="12 sequences of 32 tokens are needed",
        remedy="evaluation.num_sequences (0 leaves the evaluation out)",
    )


def test_evaluation_text_of_another_vocabulary(source: Path, tmp_path: Path) -> None:
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(write_token_ids(tmp_path / "calibration.npy", 4, 32)),
        evaluation={
            "num_sequences": 2,
            "data": str(write_token_ids(tmp_path / "e.npy", 2, 32, 97)),
        },
        what="token ids",
        rule="ids 0 to 95",
    )


def test_token_file_of_numbers_that_are_no_ids(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros((4, 32)))
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(tmp_path / "floats.npy"),
        value="float64 [4, 32]",
        rule="integers",
    )


def test_sequences_that_tp_cannot_cut(source: Path) -> None:
    refuse(
        LayoutError,
        source,
        world=2,
        tp=2,
        recipe="fp8",
        calibration={**SIZE, "seq_len": 31},
        what="calibration.seq_len",
        value="31",
        rule="parallel.tp=2",
        remedy="calibration.seq_len=30",
    )


# --- the output


def test_output_that_is_not_empty(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "taken"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    refuse(
        OutputError,
        source,
        output=output,
        what=str(output),
        value="a directory with files in it",
        rule="never overwritten",
        remedy="choose another output",
    )


def test_output_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    refuse(OutputError, source, output=tmp_path / "taken", value="a file", rule="must not exist")


@pytest.mark.parametrize("place", ["source", "source/out", "source/deep/out", "."])
def test_output_and_source_in_each_other(place: str, source: Path, tmp_path: Path) -> None:
    refuse(
        OutputError,
        source,
        output=tmp_path / place,
        data=str(write_token_ids(tmp_path / "ids.npy", 4, 32)),
        value=f"the source is {source}",
        rule="must not lie in each other",
        remedy="choose another output",
    )


def test_work_directory_that_is_no_run(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    config = golden_config(tmp_path / "out", checkpoint=str(source), recipe=WEIGHT_ONLY)
    with pytest.raises(OutputError, match=r"out\.partial.*no journal.*choose another output"):
        calibrate(config, CONF_DIR, Place(), "")
    assert (work / "notes.txt").read_text() == "mine"


def test_unfinished_run_of_another_job(source: Path, tmp_path: Path) -> None:
    ids = str(write_token_ids(tmp_path / "ids.npy", 4, 32))
    name = f"{EXPERT}.7.down_proj.weight"
    good = load_file(source / "model.safetensors")[name]
    edit_tensors(source, **{name: torch.full_like(good, torch.nan)})
    config = golden_config(tmp_path / "out", checkpoint=str(source), recipe=WEIGHT_ONLY, data=ids)
    with pytest.raises(NumericsError):
        calibrate(config, CONF_DIR, Place(), "")
    kept = digest_directory(tmp_path / "out.partial")
    other = golden_config(
        tmp_path / "out", checkpoint=str(source), recipe=WEIGHT_ONLY, data=ids, cast=True
    )
    with pytest.raises(OutputError, match="cast"):
        calibrate(other, CONF_DIR, Place(), "")
    assert digest_directory(tmp_path / "out.partial") == kept


# --- evaluation


def test_evaluation_on_calibration_text(source: Path, tmp_path: Path) -> None:
    ids = write_token_ids(tmp_path / "ids.npy", SIZE["num_sequences"], SIZE["seq_len"])
    refuse(
        DataError,
        source,
        recipe=EVERYTHING,
        data=str(ids),
        evaluation={"num_sequences": 2, "data": str(ids)},
        what="evaluation.data=",
        value="100% of the evaluation text (by runs of 16 tokens) is calibrated on",
        rule="text of its own",
        remedy="other text as evaluation.data, or leave it out",
    )


def test_gates_without_a_forward_pass(source: Path) -> None:
    refuse(
        ConfigError,
        source,
        recipe=WEIGHT_ONLY,
        evaluation={"num_sequences": 2, "max_kl": 0.1},
        what="evaluation",
        value="gates",
        rule="needs no forward pass, so nothing is measured",
        remedy="launch.evaluate",
    )
