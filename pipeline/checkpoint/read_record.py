"""Digests of what was read of the source: whether a restart reads what was packed.

In: the bytes of every shard, as they are read. Out: for each layer a digest per shard, which its
part of the journal keeps; and, where a restart reads the same shard of a committed layer again, an
error if its bytes have changed. A file may keep its size, its time of change and its ends, and have
another bit in its middle: only its bytes tell.

The digest is XXH3 with 128 bits (made for speed: it finds accidents, not forgeries), of each piece
of at most 16 MiB, and of these in order: several threads read one shard.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping

import xxhash

from pipeline.checkpoint.safetensors_file import CHUNK_BYTES, TensorInfo
from pipeline.errors import SourceError
from pipeline.sharding import Shard

OUTSIDE = "outside the layers"
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.")


class ReadRecord:
    """What one rank has read; threads may use it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[int | str, dict[str, str]] = {}
        self._expected: dict[str, str] = {}
        self._paths: dict[str, str] = {}

    def expect(self, digests: Mapping[str, str]) -> None:
        """Tells what was read when layers were packed that are committed.

        Raises:
            SourceError: Something else was read already.
        """
        with self._lock:
            read = {key: value for part in self._read.values() for key, value in part.items()}
            self._expected |= digests
        for key, digest in digests.items():
            if read.get(key, digest) != digest:
                raise _changed(key, self._paths[key], "since it was packed by an earlier attempt")

    def add(self, info: TensorInfo, shard: Shard | None, digest: str) -> None:
        """Takes the digest of a shard that was read; None is the whole tensor.

        Raises:
            SourceError: The same shard had another one when its layer was packed, or when it was
                read before.
        """
        key = _key_of(info, shard)
        with self._lock:
            self._paths[key] = str(info.path)
            expected = self._expected.get(key, digest)
            known = self._read.setdefault(_unit_of(info.name), {}).setdefault(key, digest)
        if expected != digest:
            raise _changed(key, str(info.path), "since it was packed by an earlier attempt")
        if known != digest:
            raise _changed(key, str(info.path), "since this attempt read it first")

    def of_layer(self, layer: int) -> dict[str, str]:
        """The digests of a layer's shards, by the tensor's name and the part of it."""
        with self._lock:
            return dict(self._read.get(layer, {}))

    def of_outside(self) -> dict[str, str]:
        """Those of the tensors outside the layers."""
        with self._lock:
            return dict(self._read.get(OUTSIDE, {}))


def digest_piece(data: memoryview) -> bytes:
    """The digest of one piece; other threads go on meanwhile."""
    return xxhash.xxh3_128_digest(data)


def digest_pieces(digests: Iterable[bytes]) -> str:
    """The digest of a shard, from those of its pieces in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def digest_whole(data: memoryview) -> str:
    """The digest of a shard that is read in one stretch."""
    starts = range(0, len(data), CHUNK_BYTES)
    return digest_pieces(digest_piece(data[start : start + CHUNK_BYTES]) for start in starts)


def _unit_of(name: str) -> int | str:
    match = _LAYER.match(name)
    return int(match[1]) if match else OUTSIDE


def _key_of(info: TensorInfo, shard: Shard | None) -> str:
    if shard is None or shard.is_whole:
        return info.name
    ranges = ",".join(f"{start}:{stop}" for start, stop in shard.ranges)
    return f"{info.name} dim {shard.dim} {ranges}"


def _changed(key: str, where: str, when: str) -> SourceError:
    return SourceError(
        f"{where}: {key}",
        value=f"other bytes: changed {when}",
        rule="a source must stay as it is until the run has ended",
        remedy="restore the file and start the same command again; or, if the file is right now, "
        "remove the work directory OUTPUT.partial to start from the beginning",
    )
