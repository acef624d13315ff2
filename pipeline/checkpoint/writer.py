"""Writing safetensors files: streamed, checksummed, and never half there under their name.

In: tensors, raw bytes, or tensors that come in pieces (copies from other files). Out: the file and
a `FileRecord` of what is in it. Here: one file at once, in the calling thread. Large files go
through `ShardWriter`, which hashes and writes several of them in the background.

The checksum is SHA-256 (hashlib releases the GIL while it runs, 1.15 GB/s measured on one core of
a 2-core virtual machine): faster ones exist, but this one is what `sha256sum` prints and what the
Hub shows for every large file, so anybody can check a published shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pipeline.checkpoint.durable import (
    file_sha256,
    replacing,
    sync_directory,
    write_all,
    write_bytes,
    write_json,
)
from pipeline.checkpoint.host_buffers import HostBuffers
from pipeline.checkpoint.shard_writer import ShardFile, ShardWriter
from pipeline.checkpoint.writable import (
    FileRecord,
    Layout,
    RawTensor,
    StreamedTensor,
    Writable,
    chunks_of,
    dtype_and_shape,
    file_header,
    file_order,
    nbytes_of,
)

__all__ = [
    "FileRecord",
    "HostBuffers",
    "Layout",
    "RawTensor",
    "ShardFile",
    "ShardWriter",
    "StreamedTensor",
    "Writable",
    "file_sha256",
    "sync_directory",
    "write_bytes",
    "write_json",
    "write_safetensors",
]


def write_safetensors(path: Path, tensors: Mapping[str, Writable]) -> FileRecord:
    """Writes one file and syncs it; nothing appears under `path` before it is whole.

    Args:
        path: The final name; an existing file is replaced in one step.
        tensors: By name. A `TensorInfo` is copied from the file it lies in.

    Raises:
        OutputError: The disk is full, or writing failed otherwise; names the file and the free
            space, and leaves nothing behind.
        SourceError: A file that is copied from ended early.
    """
    layout = {name: dtype_and_shape(tensor) for name, tensor in tensors.items()}
    names = file_order(layout)
    header, size = file_header(names, layout)
    digest = hashlib.sha256(header)
    with replacing(path, "weights") as descriptor:
        write_all(descriptor, header)
        for name in names:
            written = 0
            for chunk in chunks_of(tensors[name]):
                digest.update(chunk)
                write_all(descriptor, chunk)
                written += len(chunk)
            assert written == nbytes_of(layout[name]), name
    return FileRecord(path.name, len(header) + size, digest.hexdigest(), layout)
