"""How fast checkpoints are read and written, beside plain reads and writes of the same bytes.

Run from the repository: `python -m bench.disk DIRECTORY`, on the file system in question. Makes
a checkpoint of Mamba, attention and MoE layers with the tensor sizes of a 550B model (its number of
experts follows from `--gigabytes`), or takes one (`--checkpoint`); reads it cold, whole and as one
rank; writes as many bytes; removes what it made. Prints JSON: medians over `--rounds`.

Before each read the page cache is dropped: the whole machine's where that is allowed (root), that
of the files (posix_fadvise) otherwise. `bytes` are those of the files: a rank that wants half of
every row reads whole rows. `fraction` is the rate over that of the plain way: for reads the better
of one and of many threads in the same round, for writes one thread that writes one file and then
syncs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import describe_machine
from launch.entry import CONF_DIR
from pipeline.architecture import Architecture, expected_tensors, layer_tensors
from pipeline.checkpoint.durable import create, write_all
from pipeline.checkpoint.read_ahead import ReadAhead, Request
from pipeline.checkpoint.safetensors_file import CHUNK_BYTES
from pipeline.checkpoint.slices import cut_of, pieces_of
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.checkpoint.writer import ShardWriter
from pipeline.model_config import read_model_config
from pipeline.sharding import ParallelDims, shard_of

# Layers of Nemotron 3 Ultra, fewer of them, with fewer experts.
CHANGES = {
    "hybrid_override_pattern": "MEM*E",
    "num_hidden_layers": 5,
    "vocab_size": 1024,
    "num_nextn_predict_layers": 0,
}
LAYOUTS = {
    "whole": ParallelDims(),
    "one rank of EP2": ParallelDims(world=2, ep=2),
    "one rank of TP2, ETP2": ParallelDims(world=2, tp=2, etp=2),
}
FILE_BYTES = 2 << 30
BLOCK = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)


@dataclass(frozen=True)
class RandomTensor:
    """A tensor whose bytes are those of `BLOCK`, again and again."""

    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return 2 * int(np.prod(self.shape))

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in pieces."""
        for start in range(0, self.nbytes, len(BLOCK)):
            yield memoryview(BLOCK)[: min(len(BLOCK), self.nbytes - start)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where files are made")
    parser.add_argument("--checkpoint", type=Path, help="read this one instead of a made one")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of what is made")
    parser.add_argument("--write-gigabytes", type=float, default=4.0, help="size of each write")
    parser.add_argument("--threads", type=int, default=8, help="readers")
    parser.add_argument("--files", type=int, default=2, help="files that are written at a time")
    parser.add_argument("--buffer-gigabytes", type=float, default=0.5, help="ring of the readers")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        scratch = Path(name)
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = scratch / "checkpoint"
            make_checkpoint(checkpoint, arguments.gigabytes * 1e9)
        read = measure_reads(checkpoint, arguments)
        if arguments.checkpoint is None:
            shutil.rmtree(checkpoint)
        write = measure_writes(scratch, arguments)
    options = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    result = describe_machine(arguments.directory) | {"options": options}
    text = json.dumps(result | {"read": read, "write": write}, indent=1)
    print(re.sub(r"\[\s+([\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text))


# ---- reading


def make_checkpoint(directory: Path, nbytes: float) -> None:
    """Files of about 2 GiB, in the order of the layers."""
    directory.mkdir()
    ultra = read_model_config("nemotron3_ultra", CONF_DIR) | CHANGES
    ultra["num_experts_per_tok"] = 2
    sizes = [checkpoint_bytes(ultra | {"n_routed_experts": count}) for count in (2, 4)]
    experts = 2 + 2 * max(0, int((nbytes - sizes[0]) // (sizes[1] - sizes[0])))
    config = ultra | {"n_routed_experts": experts}
    (directory / "config.json").write_text(json.dumps(config))
    groups: list[dict[str, RandomTensor]] = [{}]
    for spec in expected_tensors(Architecture.from_hf_config(config)):
        tensor = RandomTensor(spec.shape)
        if sum(t.nbytes for t in groups[-1].values()) + tensor.nbytes > FILE_BYTES:
            groups.append({})
        groups[-1][spec.name] = tensor
    with ShardWriter(directory, threads=2) as writer:
        for number, group in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            layout = {key: (tensor.dtype, tensor.shape) for key, tensor in group.items()}
            file = writer.open(name, layout)
            for key in file.names:
                file.put(key, group[key])
            file.finish()


def checkpoint_bytes(config: dict[str, Any]) -> int:
    """Size of a made checkpoint."""
    specs = expected_tensors(Architecture.from_hf_config(config))
    return sum(RandomTensor(spec.shape).nbytes for spec in specs)


def measure_reads(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain reads and `ReadAhead`, in turn."""
    source = open_source(checkpoint)
    files = sorted({info.path for info in source.tensors.values()})
    threads = arguments.threads
    ways: dict[str, Callable[[], int]] = {
        "plain, 1 thread": lambda: read_plainly(files, 1),
        f"plain, {threads} threads": lambda: read_plainly(files, threads),
    }
    for name, dims in LAYOUTS.items():
        ways[name] = lambda dims=dims: read_ahead(source, dims, arguments)
    results = in_turn(ways, arguments.rounds, before=lambda: drop_caches(files))
    source.close()
    summarize(results, [name for name in ways if name.startswith("plain")])
    return {"page cache": drop_caches(files), "files": len(files), **results}


def read_plainly(files: list[Path], threads: int) -> int:
    """Every byte, in order, by reads of 16 MiB; returns their number."""
    work: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
    for descriptor, size in zip(descriptors, sizes, strict=True):
        for start in range(0, size, CHUNK_BYTES):
            work.put((descriptor, start))
    for _ in range(threads):
        work.put(None)

    def run() -> None:
        buffer = bytearray(CHUNK_BYTES)
        while (piece := work.get()) is not None:
            os.preadv(piece[0], [buffer], piece[1])

    pool = [threading.Thread(target=run) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    for descriptor in descriptors:
        os.close(descriptor)
    return sum(sizes)


def read_ahead(source: FileSource, dims: ParallelDims, arguments: argparse.Namespace) -> int:
    """All layers, as rank 0 of a layout; returns the bytes that are read from the files."""
    architecture = Architecture.from_hf_config(source.config)
    layers: list[list[Request]] = []
    nbytes = 0
    for layer in range(len(architecture.layers)):
        layers.append([])
        for spec in layer_tensors(architecture, layer):
            shard = shard_of(spec, architecture, dims, 0)
            if shard is not None:
                layers[-1].append((spec, spec.name, shard))
                cut = cut_of(source.info(spec.name), shard)
                nbytes += sum(piece.nbytes for piece in pieces_of(cut))
    with ReadAhead(
        layers,
        source,
        threads=arguments.threads,
        buffer_bytes=int(arguments.buffer_gigabytes * 1e9),
        pinned=False,
    ) as ahead:
        for _ in layers:
            for item in ahead.layer():
                item.release()
    return nbytes


def drop_caches(files: list[Path]) -> str:
    """Makes the next read come from the disk; returns how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return "dropped by posix_fadvise"
    return "dropped by drop_caches"


# ---- writing


def measure_writes(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain writes and `ShardWriter`, in turn."""
    nbytes, files = int(arguments.write_gigabytes * 1e9), arguments.files
    ways: dict[str, Callable[[], int]] = {
        "plain, 1 file": lambda: write_plainly(directory, nbytes, 1),
        f"plain, {files} files": lambda: write_plainly(directory, nbytes, files),
        "ShardWriter, 1 file": lambda: write_shards(directory, nbytes, 1),
        f"ShardWriter, {files} files": lambda: write_shards(directory, nbytes, files),
        "discard, 1 file": lambda: write_shards(directory, nbytes, 1, discard=True),
        f"discard, {files} files": lambda: write_shards(directory, nbytes, files, discard=True),
        "SHA-256 alone, 1 thread": lambda: hash_plainly(nbytes),
    }

    def clean() -> None:
        for path in directory.iterdir():
            path.unlink()
        drop_caches([])

    results = in_turn(ways, arguments.rounds, before=clean)
    clean()
    summarize(results, ["plain, 1 file"])
    return results


def write_plainly(directory: Path, nbytes: int, files: int) -> int:
    """Files side by side, one thread each: writes of 16 MiB, then fsync."""
    pieces = nbytes // files // CHUNK_BYTES
    block = memoryview(BLOCK)

    def run(number: int) -> None:
        descriptor = create(directory / f"plain-{number}")
        for piece in range(pieces):
            start = piece * CHUNK_BYTES % len(block)
            write_all(descriptor, block[start : start + CHUNK_BYTES])
        os.fsync(descriptor)
        os.close(descriptor)

    pool = [threading.Thread(target=run, args=(number,)) for number in range(files)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return files * pieces * CHUNK_BYTES


def write_shards(directory: Path, nbytes: int, files: int, *, discard: bool = False) -> int:
    """Files of packed experts side by side: codes, block scales and scalars."""
    codes, scales = torch.from_numpy(BLOCK)[: 5120 * 1024], torch.from_numpy(BLOCK)[: 5120 * 128]
    codes = codes.view(5120, 1024)
    scales = scales.view(torch.float8_e4m3fn).view(5120, 128)
    experts = range(max(1, nbytes // files // (codes.nbytes + scales.nbytes + 4)))
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for expert in experts:
        layout |= {
            f"{expert}.weight_scale_2": ("F32", ()),
            f"{expert}.weight": ("U8", (5120, 1024)),
            f"{expert}.weight_scale": ("F8_E4M3", (5120, 128)),
        }
        tensors |= {
            f"{expert}.weight_scale_2": torch.tensor(float(expert)),
            f"{expert}.weight": codes,
            f"{expert}.weight_scale": scales,
        }
    with ShardWriter(directory, threads=files, discard=discard) as writer:
        opened = [writer.open(f"shard-{number}", layout) for number in range(files)]
        for name in opened[0].names:
            for file in opened:
                file.put(name, tensors[name])
        records = [file.finish() for file in opened]
        return sum(record.result().bytes for record in records)


def hash_plainly(nbytes: int) -> int:
    """SHA-256 of as many bytes."""
    digest = hashlib.sha256()
    pieces = nbytes // len(BLOCK)
    for _ in range(pieces):
        digest.update(BLOCK)
    return pieces * len(BLOCK)


# ---- figures


def in_turn(
    ways: dict[str, Callable[[], int]], rounds: int, before: Callable[[], object]
) -> dict[str, dict[str, Any]]:
    """Bytes and seconds of each way; a round takes all of them, so that all see the same machine.

    The first round only warms up.
    """
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            before()
            start = time.monotonic()
            results[name]["bytes"] = way()
            if number:
                results[name]["seconds"].append(time.monotonic() - start)
    return results


def summarize(results: dict[str, dict[str, Any]], plain: Sequence[str]) -> None:
    """Adds rates, and what they are of the better plain way's in the same round (medians)."""
    rounds = zip(*(results[name]["seconds"] for name in plain), strict=True)
    sizes = [results[name]["bytes"] for name in plain]
    best = [max(n / t for n, t in zip(sizes, times, strict=True)) for times in rounds]
    for result in results.values():
        rates = [result["bytes"] / seconds for seconds in result["seconds"]]
        shares = [rate / other for rate, other in zip(rates, best, strict=True)]
        result["seconds"] = [round(seconds, 2) for seconds in result["seconds"]]
        result["GB/s"] = round(statistics.median(rates) / 1e9, 3)
        result["fraction"] = round(statistics.median(shares), 2)


if __name__ == "__main__":
    main()
