"""What compiles kernels ahead runs every layer; on a CPU there is nothing to compile."""

import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.entry import CONF_DIR
from pipeline import preparation
from pipeline.architecture import Architecture
from pipeline.compile_ahead import CompileAhead
from pipeline.config import CalibrateConfig, ParallelConfig
from pipeline.job import StoredTensor, estimate_stored
from pipeline.mcore import backend, compile_kernels
from pipeline.mcore.compile_kernels import Formats, Request
from pipeline.mcore.slots import Slot
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import WeightMethod
from pipeline.preparation import Place
from tests.unit.mcore.models import BASE

CPU = torch.device("cpu")
REQUEST = Request(
    config=BASE,
    layers=[0, 1, 2, 3],
    sums_in_fp32=True,
    dtypes={"backbone.layers.1.mixer.gate.weight": "float32"},
    device="cpu",
    compute_dtype="float32",
    seq_len=32,
    fills=True,
)
FORMATS = Formats(["four_over_six", "max"], True, True, [[1.0, 1.5]], "reference", True)


@pytest.fixture(autouse=True)
def stopped() -> Any:
    yield
    backend.stop()


def test_every_layer_runs_with_and_without_a_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    forward = Slot.forward

    def record(slot: Slot, hidden: torch.Tensor, tap: Any = None) -> torch.Tensor:
        runs.append((slot.layer, tap is not None, tuple(hidden.shape)))
        return forward(slot, hidden, tap)

    monkeypatch.setattr(Slot, "forward", record)
    compile_kernels.compile_layers(REQUEST, CPU)
    assert sorted(runs) == [
        (layer, has_tap, (32, 2, 64)) for layer in range(4) for has_tap in (False, True)
    ]


@pytest.mark.parametrize("evaluates", [True, False])
def test_every_format_is_packed_and_read(evaluates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packs, done = type(get_backend("reference")), []

    def record(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            method = [str(value) for value in given if isinstance(value, WeightMethod)]
            done.append((name, *method, *options.values()))
            return function(*given, **options)

        monkeypatch.setattr(owner, name, call)

    measures = ("pack_nvfp4", "pack_fp8", "fp8_squared_errors")
    for name in (*measures, "dequantize_nvfp4", "zero_flushed"):
        record(packs, name)
    inputs = ("count_beyond", "fp8_input", "nvfp4_input", "sum_squares")
    for name in inputs:
        record(compile_kernels, name)
    formats = FORMATS._replace(evaluates=evaluates)
    lines = [json.dumps(REQUEST._asdict()), json.dumps(formats._asdict())]
    compile_kernels.main(io.StringIO("\n".join(lines)))
    served = [("dequantize_nvfp4",), ("zero_flushed",)] * 2
    served += [(name,) for name in (*inputs, "sum_squares")]
    packed = [
        *(("fp8_squared_errors",), ("pack_fp8",)),
        *(("pack_nvfp4", "four_over_six", True), ("pack_nvfp4", "max", False)),
    ]
    assert sorted(done) == sorted([*packed, *(served if evaluates else [])])


def start(
    seq_len: int = 32,
    config: dict[str, Any] = BASE,
    stored: dict[str, StoredTensor] | None = None,
) -> CompileAhead:
    return CompileAhead.start(
        config,
        stored or estimate_stored(Architecture.from_hf_config(config)),
        device=CPU,
        dtype=torch.float32,
        seq_len=seq_len,
        sums_in_fp32=False,
        fills=False,
    )


@pytest.mark.slow
def test_the_process_ends_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pipeline"):
        start().wait()
    assert [r.levelname for r in caplog.records] == ["DEBUG"]
    assert "kernels compiled ahead in" in caplog.text


@pytest.mark.slow
def test_its_failure_is_told_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ahead = start(seq_len=-32)
    ahead.wait()
    ahead.wait()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "first layers take longer" in record.message
    assert "non-negative" in record.message


def test_stop_ends_it_at_once() -> None:
    ahead = start()
    process = ahead._process
    assert process is not None
    ahead.stop()
    ahead.stop()
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_large_model_in_fp32_asks_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe holds 64 KiB until the process has imported what it needs."""
    asked: list[Any] = []
    monkeypatch.setattr(CompileAhead, "_ask", lambda self, request: asked.append(request))
    config = {**BASE, "n_routed_experts": 512}
    stored = {
        name: dataclasses.replace(tensor, dtype="F32")
        for name, tensor in estimate_stored(Architecture.from_hf_config(config)).items()
    }
    start(config=config, stored=stored).stop()
    (request,) = asked
    assert len(json.dumps(request)) < 2**14
    assert request["dtypes"]["backbone.layers.1.mixer.experts.0.up_proj.weight"] == "float32"
    assert not any("experts.1." in name for name in request["dtypes"])


def test_a_process_that_cannot_start_harms_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("pipeline.compile_ahead.start_module", refuse)
    ahead = start()
    ahead.wait()
    ahead.stop()
    assert "kernels are not compiled ahead: [Errno 12]" in caplog.text


@pytest.mark.slow
def test_it_ends_with_the_process_that_started_it() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1.0)  # the child has told the system by now
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5.0
    while Path(f"/proc/{child}").exists() and "Z" not in state_of(child):
        assert time.monotonic() < deadline, "the process outlived the one that started it"
        time.sleep(0.05)


PARENT = """
import tempfile, time
from pipeline.runtime.child import start_module
child = start_module("pipeline.mcore.compile_kernels", tempfile.TemporaryFile("w+"))
print(child.pid, flush=True)
time.sleep(60)
"""


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [((2, 1, 1), False), ((1, 2, 1), True), ((1, 1, 2), True), ((1, 1, 1), False)],
    ids=lambda value: str(value),
)
def test_experts_of_several_ranks_add_up_in_fp32(
    degrees: tuple[int, int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tp, ep, etp = degrees
    asked: dict[str, Any] = {}
    monkeypatch.setattr(CompileAhead, "start", lambda *_, **options: asked.update(options))
    config = CalibrateConfig(
        checkpoint="synthetic",
        model="demo",
        output="discard",
        recipe="x",
        parallel=ParallelConfig(tp=tp, ep=ep, etp=etp),
    )
    opened = preparation.open_checkpoint(config, CONF_DIR, CPU)
    preparation._compile_ahead(config, opened, Place(0, tp * ep * etp), torch.device("cuda"))
    assert asked["sums_in_fp32"] is expected
