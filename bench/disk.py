"""How fast checkpoints are read and written, beside plain reads and writes of the same bytes.

Run from the repository: `python bench/disk.py DIRECTORY`, on the file system in question. Makes
a checkpoint of Mamba, attention and MoE layers with the tensor sizes of a 550B model (its number of
experts follows from `--gigabytes`), or takes one (`--checkpoint`); reads it cold, whole and as one
rank; writes as many bytes; removes what it made. Prints JSON: medians over `--rounds`.

Before each read the page cache is dropped: the whole machine's where that is allowed (root), that
of the files (posix_fadvise) otherwise. `fraction` is the rate over that of the plain way: for
reads the better of one and of many threads, for writes one thread that writes, then syncs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import queue
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.architecture import Architecture, expected_tensors, layer_tensors
from pipeline.checkpoint.durable import create, write_all
from pipeline.checkpoint.read_ahead import ReadAhead, Request
from pipeline.checkpoint.safetensors_file import CHUNK_BYTES
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.checkpoint.writer import ShardWriter
from pipeline.sharding import ParallelDims, shard_of

CONFIG = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEM*E",
    "num_hidden_layers": 5,
    "hidden_size": 8192,
    "vocab_size": 1024,
    "num_attention_heads": 64,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 256,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 5120,
    "moe_latent_size": 2048,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 10240,
    "intermediate_size": 5120,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
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
    parser.add_argument("--buffer-gigabytes", type=float, default=2.0, help="ring of the readers")
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
    environment = describe_machine(arguments.directory)
    print(json.dumps({**environment, "options": options, "read": read, "write": write}, indent=1))


# ---- reading


def make_checkpoint(directory: Path, nbytes: float) -> None:
    """Files of about 2 GiB, in the order of the layers."""
    directory.mkdir()
    experts = 2
    while checkpoint_bytes(experts + 2) <= nbytes:
        experts += 2
    config = {**CONFIG, "n_routed_experts": experts}
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


def checkpoint_bytes(experts: int) -> int:
    """Size of a made checkpoint."""
    architecture = Architecture.from_hf_config({**CONFIG, "n_routed_experts": experts})
    return sum(RandomTensor(spec.shape).nbytes for spec in expected_tensors(architecture))


def measure_reads(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain reads and `ReadAhead`, in turn."""
    source = open_source(checkpoint)
    files = sorted({info.path for info in source.tensors.values()})
    threads, results = arguments.threads, {}
    ways: dict[str, Callable[[], int]] = {
        "plain, 1 thread": lambda: read_plainly(files, 1),
        f"plain, {threads} threads": lambda: read_plainly(files, threads),
    }
    for name, dims in LAYOUTS.items():
        ways[name] = lambda dims=dims: read_ahead(source, dims, arguments)
    cold = ""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            cold = drop_caches(files)
            start = time.monotonic()
            nbytes = way()
            times[name].append(time.monotonic() - start)
            results[name] = {"bytes": nbytes}
    source.close()
    best = max(rate(results[name], times[name]) for name in ways if name.startswith("plain"))
    for name, result in results.items():
        result |= summary(result, times[name], best)
    return {"page cache": cold, "files": len(files), **results}


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
    """All layers, as rank 0 of a layout; returns the bytes of its shards."""
    architecture = Architecture.from_hf_config(source.config)
    layers: list[list[Request]] = []
    for layer in range(len(architecture.layers)):
        shards = [
            (s, shard_of(s, architecture, dims, 0)) for s in layer_tensors(architecture, layer)
        ]
        layers.append([(spec, spec.name, shard) for spec, shard in shards if shard is not None])
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
    return ahead.bytes_read


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
    times: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            drop_caches([])
            start = time.monotonic()
            results[name] = {"bytes": way()}
            times[name].append(time.monotonic() - start)
            for path in directory.iterdir():
                path.unlink()
    plain = rate(results["plain, 1 file"], times["plain, 1 file"])
    for name, result in results.items():
        result |= summary(result, times[name], plain)
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


def rate(result: dict[str, Any], times: list[float]) -> float:
    """GB/s at the median time."""
    return float(result["bytes"]) / statistics.median(times) / 1e9


def summary(result: dict[str, Any], times: list[float], plain: float) -> dict[str, Any]:
    """Rates of one way."""
    return {
        "seconds": [round(seconds, 2) for seconds in times],
        "GB/s": round(rate(result, times), 3),
        "fraction": round(rate(result, times) / plain, 2),
    }


def describe_machine(directory: Path) -> dict[str, Any]:
    """Hardware and versions; nothing that names the machine."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else 'unknown'}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "disk": describe_disk(directory),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kernel": platform.release().split("-")[0],
        },
    }


def describe_disk(directory: Path) -> str:
    """File system, and the disk below it where that is one."""
    kind, longest = "unknown file system", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, this_kind, *_ = line.split()
        if directory.resolve().is_relative_to(mount) and len(mount) >= len(longest):
            kind, longest = this_kind, mount
    device = os.stat(directory).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for candidate in (block, block.parent):
        model = candidate / "device" / "model"
        if model.is_file():
            return f"{kind} on {model.read_text().strip()}"
    return f"{kind} on {''.join(c for c in block.name if c.isalpha()) or 'no block device'}"


if __name__ == "__main__":
    main()
