"""Parts of the sweep: what a rank reads, how files are filled, what is committed, what is told."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.architecture import Architecture, Role
from pipeline.checkpoint.journal import SCALARS, Journal
from pipeline.checkpoint.source import open_source
from pipeline.checkpoint.source_check import check_source
from pipeline.commits import ScalarSettings, coverage
from pipeline.errors import SourceError
from pipeline.job import Job, build_job, estimate_stored
from pipeline.packing import LayerPacker
from pipeline.plan_ranks import written_bytes
from pipeline.reading import Reading, requests_of
from pipeline.recipe import load_recipe
from pipeline.runtime.collectives import Ranks
from pipeline.runtime.progress import Progress
from pipeline.schedule import split_by_size
from pipeline.sharding import ParallelDims
from pipeline.sweep import OUTER, Sweep, SweepSettings
from tests.unit.checkpoint.tiny import tiny_config, tiny_tensors, write_source

PRESETS = Path(__file__).parents[2] / "conf" / "recipe"
CPU = torch.device("cpu")
CONFIG = tiny_config(
    hybrid_override_pattern="ME*",
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    n_routed_experts=4,
    n_groups=2,
)


class At(Ranks):
    """A rank of a grid that no process group stands behind."""

    def __init__(self, rank: int) -> None:
        super().__init__(None, None, None, CPU)
        object.__setattr__(self, "_rank", rank)

    @property
    def rank(self) -> int:
        return int(self._rank)  # type: ignore[attr-defined]


def job_of(recipe: str, dims: ParallelDims | None = None) -> Job:
    architecture = Architecture.from_hf_config(CONFIG)
    stored = estimate_stored(architecture)
    return build_job(architecture, dims or ParallelDims(), load_recipe(recipe, PRESETS), stored)


def sweep_of(job: Job, rank: int = 0, **changes: Any) -> Sweep:
    ranks = At(rank) if rank else Ranks(None, None, None, CPU)
    settings = SweepSettings(
        scalars=ScalarSettings(clamp_kv_scales=True, unobserved_input_scale=None),
        max_shard_bytes=10**9,
        reading=Reading(cast=False),
    )
    values: dict[str, Any] = {
        "job": job,
        "source": None,
        "journal": None,
        "files": Path(),
        "ranks": ranks,
        "packer": LayerPacker(job.architecture, job.dims, ranks),
        "slots": None,
        "store": None,
        "settings": settings,
        "progress": Progress(3, 0, CPU, interval_s=0.0, enabled=False),
    }
    return Sweep(**values | changes)


def on_disk(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> Sweep:
    tmp_path.mkdir(exist_ok=True)
    weights = {name: tensor.to(dtype) for name, tensor in tiny_tensors(CONFIG).items()}
    source = open_source(str(write_source(tmp_path / "source", CONFIG, weights)))
    job = job_of("nvfp4_weight_only")
    check_source(source, job.architecture, cast=True)
    stored = {
        name: dataclasses.replace(tensor, dtype=source.tensors[name].dtype)
        for name, tensor in job.stored.items()
    }
    files = tmp_path / "files"
    files.mkdir()
    journal = Journal(tmp_path / "journal", files)
    journal.start({"test": 1})
    job = dataclasses.replace(job, stored=stored)
    return sweep_of(job, source=source, journal=journal, files=files)


@pytest.mark.parametrize("limit", [1, 300, 5000, 10**9])
def test_files_outside_the_layers_stay_below_their_limit(limit: int) -> None:
    job = job_of("nvfp4_weight_only")
    names = [name for name, _ in job.outer]
    groups = split_by_size(names, [job.stored[name].nbytes for name in names], limit)
    assert [name for group in groups for name in group] == names
    for group in groups:
        assert len(group) == 1 or sum(job.stored[name].nbytes for name in group) <= limit
    assert len(groups) == (len(names) if limit == 1 else 1) or limit in (300, 5000)
    assert split_by_size([], [], limit) == []


def test_without_a_forward_pass_ranks_read_only_what_they_pack() -> None:
    """Replicas take turns: over all ranks, every quantized element is read exactly once."""
    dims = ParallelDims(world=4, tp=2, ep=2)
    job = job_of("nvfp4_weight_only", dims)
    read = dict.fromkeys((spec.name for spec in job.specs), 0)
    for rank in range(4):
        for schedule in job.schedules:
            for spec, _, shard in requests_of(job, schedule, rank, all_shards=False):
                size = torch.Size(shard.shape).numel()
                read[spec.name] += size if shard.counted or not shard.is_whole else 0
    quantized = {
        name
        for name in read
        if (f := job.resolution.formats.get(name.removesuffix(".weight"))) and f.is_quantized
    }
    assert {name for name, count in read.items() if count} == quantized
    for spec in job.specs:
        if spec.name in quantized:
            assert read[spec.name] == spec.parameters, spec.name


def test_with_a_forward_pass_a_rank_reads_all_that_it_holds() -> None:
    dims = ParallelDims(world=4, tp=2, ep=2)
    job = job_of("nvfp4_four_over_six", dims)
    requests = requests_of(job, job.schedules[1], 1, all_shards=True)
    experts = {spec.expert for spec, _, _ in requests if spec.role is Role.routed_expert}
    assert experts == {2, 3}  # rank 1 is ep_rank 1
    assert "backbone.layers.1.norm.weight" in {spec.name for spec, _, _ in requests}


def test_a_weight_only_sweep_writes_what_the_plan_says(tmp_path: Path) -> None:
    sweep = on_disk(tmp_path)
    sweep.run()
    tensors = {}
    total = 0
    for unit in (OUTER, 0, 1, 2):
        record = sweep.journal.committed(unit)
        assert record is not None
        assert record.parts[-1].part == SCALARS
        for file in record.files:
            tensors |= file.tensors
            assert (sweep.files / file.name).stat().st_size == file.bytes
    for dtype, shape in tensors.values():
        size = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        total += torch.Size(shape).numel() * size
    assert total == sum(written_bytes(sweep.job))


def test_committed_layers_are_not_done_again(tmp_path: Path) -> None:
    sweep = on_disk(tmp_path)
    sweep.run()
    before = {path: path.stat().st_mtime_ns for path in sweep.files.iterdir()}
    sweep.run()
    assert {path: path.stat().st_mtime_ns for path in sweep.files.iterdir()} == before
    (torn,) = sweep.files.glob("layer-00001-*")
    torn.write_bytes(torn.read_bytes()[:-1])
    assert sweep._committed() == {OUTER, 0, 2}
    sweep.run()
    assert sweep._committed() == {OUTER, 0, 1, 2}
    kept = {path for path in before if path.stat().st_mtime_ns == before[path]}
    assert set(before) - kept == {torn}


def test_casting_rounds_only_what_may_be_quantized(tmp_path: Path) -> None:
    """F32 weights give the same packed bytes as the BF16 values that they are rounded to."""
    written = []
    for folder, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        sweep = on_disk(tmp_path / folder, dtype=dtype)
        sweep.settings = dataclasses.replace(
            sweep.settings, reading=Reading(cast=dtype is torch.float32)
        )
        sweep.run()
        packed = {}
        for path in sweep.files.glob("layer-*"):
            tensors = load_file(path)
            packed |= {
                name: tensor.view(torch.uint8).tolist()
                for name, tensor in tensors.items()
                if tensor.dtype in (torch.uint8, torch.float8_e4m3fn)
            }
        written.append(packed)
    assert written[0]
    assert written[0] == written[1]


def test_a_tensor_that_left_the_source_is_named(tmp_path: Path) -> None:
    sweep = on_disk(tmp_path)
    sweep.source.tensors.pop("lm_head.weight")
    with pytest.raises(SourceError, match=r"lm_head\.weight: found no such tensor"):
        sweep._copy("lm_head.weight")


def test_progress_tells_how_many_experts_were_seen() -> None:
    assert coverage({"tokens_per_expert": [3, 0, 1]}) == ", experts seen 2/3"
    assert coverage({"tokens_per_expert": []}) == coverage({}) == ""
