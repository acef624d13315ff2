"""A source that changes while a run is interrupted, or before it begins."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.checkpoint.source import open_source
from tests.e2e.harness import GOLDEN, run_job
from tests.e2e.live_ranks import Ranks
from tests.e2e.restarts import Fault, Run

EDGE_BYTES = 65536  # of a file, which the quick check of a restart reads
EXPERT = "mixer.experts.0.up_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "source", tmp_path / "source"))


def tensor_of(source: Path, *, layer: int | None, ending: str) -> TensorInfo:
    """A tensor of which a part lies away from the ends of its file."""
    prefix = "" if layer is None else f"backbone.layers.{layer}."
    for name, info in open_source(source).tensors.items():
        if name.startswith(prefix) and name.endswith(ending) and place_in(info) is not None:
            return info
    raise AssertionError(f"no {prefix}*{ending} in the middle of a file")


def place_in(info: TensorInfo) -> int | None:
    """A BF16 value's first byte that the quick check does not read."""
    first = max(EDGE_BYTES, info.start) + info.start % 2
    last = min(info.path.stat().st_size - EDGE_BYTES, info.stop)
    return (first + last) // 4 * 2 if first + 4 < last else None


def flip_mantissa_bit(info: TensorInfo) -> None:
    """The lowest bit of a value; size and time of change stay."""
    status, place = info.path.stat(), place_in(info)
    assert place is not None
    with info.path.open("r+b") as file:
        file.seek(place)
        low = file.read(1)[0]
        file.seek(place)
        file.write(bytes([low ^ 1]))
    os.utime(info.path, ns=(status.st_atime_ns, status.st_mtime_ns))


def refusal(run: Run, **options: int) -> str:
    """Starts a run that is refused on every rank; returns what it said."""
    world = options.pop("world", 1)
    degrees = [f"parallel.{axis}={degree}" for axis, degree in options.items()]
    mine = [f"{name}={value}" for name, value in run.options.items()]
    ranks = Ranks(run.output, *mine, *degrees, world=world)
    assert ranks.wait() == [2] * world
    return "".join(ranks.text(rank) for rank in range(world))


@pytest.mark.parametrize(
    ("layer", "ending", "options"),
    [
        (2, "weight", {}),
        (None, "embeddings.weight", {}),
        (None, EXPERT, {"world": 2, "ep": 2}),
        (None, "mixer.in_proj.weight", {"world": 2, "tp": 2, "ep": 1}),
    ],
)
def test_a_flipped_bit_is_noticed_where_it_is_read_again(
    tmp_path: Path,
    source: Path,
    layer: int | None,
    ending: str,
    options: dict[str, int],
) -> None:
    run = Run(tmp_path / "out", checkpoint=str(source))
    run.start(Fault("before commit", 6), **options)
    info = tensor_of(source, layer=layer, ending=ending)
    before = open_source(source).digest()
    flip_mantissa_bit(info)
    assert open_source(source).digest() == before, "the quick check must not see it"
    report = refusal(run, **options)
    assert "other bytes: changed since it was packed by an earlier attempt" in report
    assert f"{info.path}: {info.name}" in report
    flip_mantissa_bit(info)  # restored: the run goes on
    run.start(**options)
    assert run.output.is_dir()


def test_another_layout_reads_other_slices_and_compares_those_that_are_the_same(
    tmp_path: Path, source: Path
) -> None:
    run = Run(tmp_path / "out", checkpoint=str(source))
    run.start(Fault("before commit", 6), world=2, ep=2)
    flip_mantissa_bit(tensor_of(source, layer=None, ending=EXPERT))
    assert "changed since it was packed" in refusal(run)


def checksums(source: Path) -> str:
    files = sorted(source.glob("*.safetensors"))
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)


def test_given_checksums_are_compared_before_the_work(tmp_path: Path, source: Path) -> None:
    (source / "SHA256SUMS").write_text(checksums(source))
    made = run_job(tmp_path / "good", world=2, ep=2, checkpoint=str(source), verify_source=True)
    assert not (made / "SHA256SUMS").exists(), "it is of the source"
    info = tensor_of(source, layer=2, ending="weight")
    flip_mantissa_bit(info)
    bad = Run(tmp_path / "bad", checkpoint=str(source), verify_source=True)
    report = refusal(bad, world=2, ep=2)
    assert "1 weight files that are not what was given" in report
    assert f"{info.path}: SHA-256 " in report
    assert not list((bad.partial / "checkpoint").iterdir())


def test_a_source_without_checksums_cannot_be_verified(tmp_path: Path, source: Path) -> None:
    run = Run(tmp_path / "out", checkpoint=str(source), verify_source=True)
    assert "1 weight files without a checksum: model.safetensors" in refusal(run)
