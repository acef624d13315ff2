"""What compiles kernels ahead runs every layer; on a CPU there is nothing to compile."""

import io
import json
import logging
import os
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.compile_ahead import CompileAhead
from pipeline.job import estimate_stored
from pipeline.mcore import backend, compile_kernels
from pipeline.mcore.compile_kernels import Formats, Request
from pipeline.mcore.slots import Slot
from pipeline.nvfp4.backends import get_backend
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
FORMATS = Formats(["four_over_six", "max"], True, True, [[1.0, 1.5]], "reference")


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


def test_every_format_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    packs, done = type(get_backend("reference")), []
    for name in ("pack_nvfp4", "pack_fp8", "fp8_squared_errors"):
        function = getattr(packs, name)

        def record(*given: Any, name: str = name, function: Any = function, **options: Any) -> Any:
            done.append((name, str(given[3]) if name == "pack_nvfp4" else "", dict(options)))
            return function(*given, **options)

        monkeypatch.setattr(packs, name, record)
    lines = [json.dumps(REQUEST._asdict()), json.dumps(FORMATS._asdict())]
    compile_kernels.main(io.StringIO("\n".join(lines)))
    assert sorted(done, key=str) == [
        ("fp8_squared_errors", "", {}),
        ("pack_fp8", "", {}),
        ("pack_nvfp4", "four_over_six", {"compare_to_max": True}),
        ("pack_nvfp4", "max", {"compare_to_max": False}),
    ]


def start(seq_len: int = 32) -> CompileAhead:
    return CompileAhead.start(
        BASE,
        estimate_stored(Architecture.from_hf_config(BASE)),
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
