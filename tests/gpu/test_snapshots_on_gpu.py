"""Snapshots on a GPU: written beside the next layers; hidden states on the device or the host."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.entry import CONF_DIR
from pipeline.calibrate import Place, calibrate
from pipeline.checkpoint.snapshot_files import SnapshotFiles, file_name, load
from pipeline.checkpoint.snapshot_writer import SnapshotWriter
from pipeline.config import ComputeDtype, Device, HiddenStorage
from pipeline.config_parts import SnapshotConfig
from pipeline.runtime.stop import Reason, Stop
from pipeline.visit import Visit
from tests.distributed.helpers import RankError, free_port, run_ranks
from tests.e2e.harness import golden_config
from tests.e2e.models import write_token_ids
from tests.e2e.restarts import published
from tests.gpu.jobs import TIMEOUT_S

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
Values = dict[str, Any]


def test_a_tensor_may_be_overwritten_as_soon_as_it_was_read(tmp_path: Path) -> None:
    """In pieces of 16 MiB; no device memory is taken for it."""
    generator = torch.Generator(GPU).manual_seed(1)
    state = {
        f"{index}": torch.randn(9, 3, 1 << 20, generator=generator, device=GPU).bfloat16()
        for index in range(3)
    }
    state["host"] = torch.randn(1000, 1000).pin_memory()
    expected = {name: tensor.cpu().clone() for name, tensor in state.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    writer = SnapshotWriter(0, tmp_path, 0, state, GPU)
    for name, tensor in state.items():
        writer.wait_for(name)()
        tensor.zero_()
    file, seconds = writer.result()
    assert torch.cuda.max_memory_allocated() - before < 2**20
    assert seconds > 0
    found = load(tmp_path / file_name(0), file)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _job(rank: int, output: Path, port: int, how: str, options: Values) -> list[int]:
    """Layers that were computed; `how` says in which way the run ends before layer 6."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    computed: list[int] = []
    forward, agreed = Visit._forward, Stop.agreed

    def counted(visit: Visit, *given: Any) -> None:
        if how == "dies" and visit.schedule.layer == 6:
            raise RuntimeError("injected")
        computed.append(visit.schedule.layer)
        forward(visit, *given)

    def asked(stop: Stop, layer: int) -> bool:
        if how == "stops" and layer == 4:
            stop.ask(Reason.file)
        return agreed(stop, layer)

    Visit._forward = counted  # type: ignore[method-assign]
    Stop.agreed = asked  # type: ignore[method-assign]
    config = golden_config(output, device=Device.cuda, **options)
    calibrate(config, CONF_DIR, Place(rank, 1, rank), "")
    return computed


def start(output: Path, how: str, options: Values) -> list[int]:
    port = free_port()
    (computed,) = run_ranks(_job, 1, output, port, how, options, timeout=TIMEOUT_S)
    return list(computed)


def evaluation_of(output: Path) -> Values:
    values = json.loads((output / "layersweep" / "run.json").read_text())["evaluation"]
    return {name: value for name, value in values.items() if name != "seconds"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """Four micro-batches, and text to evaluate on."""
    data = write_token_ids(tmp_path_factory.mktemp("text") / "ids.npy", 3, 96, 256)
    asked = {"num_sequences": 3, "group_sequences": 3, "group_seq_len": 40}
    return {
        "compute_dtype": ComputeDtype.bfloat16,
        "calibration": {"micro_batch": 2},
        "evaluation": {"data": str(data), **asked},
    }


@pytest.fixture(scope="module")
def undisturbed(options: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert start(output, "ends", options) == [*range(7)]
    return output


@pytest.mark.parametrize("how", ["dies", "stops"])
@pytest.mark.parametrize("stored", [HiddenStorage.device, HiddenStorage.host])
def test_a_restart_goes_on_with_the_same_bytes(
    stored: HiddenStorage, how: str, options: Values, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    often = SnapshotConfig(layers=1, minutes=None, keep=9)
    options = {**options, "hidden_store": stored, "snapshots": often}
    with pytest.raises(RankError, match="injected" if how == "dies" else "StoppedError"):
        start(output, how, options)
    kept = [r.layer for r in SnapshotFiles(tmp_path / "out.partial" / "snapshots").found()]
    assert kept
    if how == "stops":
        assert kept[0] == 4
    assert start(output, "ends", options) == [*range(kept[0] + 1, 7)]
    assert published(output) == published(undisturbed)
    assert evaluation_of(output) == evaluation_of(undisturbed)
