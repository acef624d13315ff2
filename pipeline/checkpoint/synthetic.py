"""A source whose weights are made up: random, reproducible, and shaped like a trained model's.

In: a config, the tensors that a checkpoint of it would hold, and a seed. Out: what a checkpoint
gives (see `pipeline.checkpoint.source.Source`), and `fill`, which writes weights straight to where
they are needed. A value depends on the seed, the tensor's name and the element's place alone, so
every layout on every device sees the same model.

The scales keep a deep model in working order. Embeddings have unit size, linears preserve the size
of what they read, and those that write to the residual stream are smaller by sqrt(2 * layers): the
embeddings dominate, tokens stay different from each other through all layers, and the router
spreads them over its experts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.random_values import (
    SPREAD,
    Window,
    fill_normal,
    key_of,
    random_bits,
    sum_of_bytes,
)
from pipeline.checkpoint.read_record import ReadRecord
from pipeline.checkpoint.safetensors_file import CHUNK_BYTES, TORCH_DTYPES, as_bytes
from pipeline.checkpoint.source import TensorHeader, no_such_tensor
from pipeline.errors import SourceError
from pipeline.sharding import Shard

GENERATOR = 1
"""Raised whenever the same seed would give other values."""

# Routed experts' down_proj writes to the residual stream only where there is no latent width.
_RESIDUAL_WRITERS = (
    ".out_proj.weight",
    ".o_proj.weight",
    ".fc2_latent_proj.weight",
    ".shared_experts.down_proj.weight",
    ".mixer.down_proj.weight",
)
_EMBEDDING = "backbone.embeddings.weight"
Filling = tuple[str, Shard | None, torch.Tensor]
"""Name of a tensor, which part of it (None: all), and where it goes."""


class SyntheticSource:
    """Random weights in the place of a checkpoint; threads may use it at the same time.

    Args:
        model: Name or path of the shape, for messages.
        config: Its config.json.
        tensors: Every tensor by name.
        seed: Another seed gives other weights.
        device: Where tensors are made that are to be read or copied.
    """

    def __init__(
        self,
        model: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorHeader],
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config = {k: v for k, v in config.items() if k != "quantization_config"}
        self.tensors = dict(tensors)
        self.small_files: dict[str, Path] = {}
        self.reads: ReadRecord | None = None  # what is made from a seed cannot change
        self.location = f"synthetic {model} (seed {seed})"
        self.seed, self.device = seed, device
        self._of_thread = threading.local()
        self._has_latent = any(name.endswith(".fc2_latent_proj.weight") for name in tensors)
        layers = {name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}
        self._residual_factor = 1 / math.sqrt(2 * max(len(layers), 1))

    def info(self, name: str) -> TensorHeader:
        """Dtype and shape of one tensor.

        Raises:
            SourceError: No such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise no_such_tensor(self.location, name)
        return info

    def read(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        """One tensor, or the part of it that `shard` describes, on the CPU.

        Raises:
            SourceError: No such tensor, or a shard that does not fit it.
        """
        info = self.info(name)
        shape = info.shape if shard is None else shard.shape
        # Vectors are made on the CPU: a GPU's queue may be long.
        device = self.device if len(info.shape) > 1 else torch.device("cpu")
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[info.dtype], device=device)
        self.fill(name, shard, tensor)
        return tensor.cpu()

    def fill(self, name: str, shard: Shard | None, target: torch.Tensor) -> None:
        """Writes a tensor, or a part of it, into `target`; on a GPU, on the current stream.

        Args:
            name: Of the tensor.
            shard: Which part; None for all of it.
            target: Of the shard's shape, in the tensor's dtype, or FP32 or BF16 instead of it.

        Raises:
            SourceError: No such tensor, or a shard that does not fit it.
        """
        self.fill_all([(name, shard, target)])

    def fill_all(self, fillings: Iterable[Filling]) -> None:
        """`fill` for many tensors; those alike in evenly spaced places (experts) in one go."""
        alike: dict[tuple[Any, ...], list[tuple[str, torch.Tensor]]] = {}
        for name, shard, target in fillings:
            info = self.info(name)
            _check_fit(self.location, info, shard)
            assert tuple(target.shape) == (info.shape if shard is None else shard.shape), name
            if len(info.shape) < 2:
                target.copy_(self._vector(info, shard), non_blocking=True)
                continue
            kind = (info.dtype, info.shape, shard, self._standard_deviation(info))
            where = (target.dtype, target.device, target.stride())
            alike.setdefault((*kind, *where), []).append((name, target))
        for (dtype, shape, shard, deviation, *_), members in alike.items():
            for names, stack in _stack(members):
                keys = [key_of(self.seed, name) for name in names]
                for window, part in _windows(shape, shard, stack):
                    fill_normal(
                        part, keys, window, standard_deviation=deviation, is_bf16=dtype == "BF16"
                    )

    def copy_stream(self) -> torch.cuda.Stream:
        """The calling thread's stream for copies, of another priority than the sweep's lanes."""
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self.device, priority=-1)
        stream: torch.cuda.Stream = self._of_thread.stream
        return stream

    def copy_of(self, name: str) -> GeneratedTensor:
        """One tensor as something to be written: its bytes, piece by piece.

        Raises:
            SourceError: No such tensor.
        """
        info = self.info(name)
        return GeneratedTensor(self, name, info.dtype, info.shape)

    def digest(self) -> str:
        """Tells apart sources that would not give the same checkpoint."""
        tensors = [(info.name, info.dtype, info.shape) for info in self.tensors.values()]
        told = json.dumps([GENERATOR, self.seed, self.config, tensors], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def close(self) -> None:
        """Nothing is open."""

    def _standard_deviation(self, info: TensorHeader) -> float:
        """Of a matrix [N, K] that keeps the size of its input: 1/sqrt(K)."""
        if info.name == _EMBEDDING:
            return 1.0
        factor = 1 / math.sqrt(math.prod(info.shape[1:]))
        writes = info.name.endswith(_RESIDUAL_WRITERS)
        writes |= not self._has_latent and info.name.endswith(".down_proj.weight")
        return factor * self._residual_factor if writes else factor

    def _vector(self, info: TensorHeader, shard: Shard | None) -> torch.Tensor:
        """A vector, or a part of it, on the CPU; made whole, as it is small."""
        key = key_of(self.seed, info.name)
        values = _vector_values(info.name, random_bits(torch.arange(*info.shape), key))
        if shard is not None and not shard.is_whole:
            values = torch.cat([values[start:stop] for start, stop in shard.ranges])
        return values.to(TORCH_DTYPES[info.dtype])


@dataclasses.dataclass(frozen=True)
class GeneratedTensor:
    """A tensor of a synthetic source, to be written.

    Attributes:
        source: Makes it.
        name: Its name there.
        dtype: As safetensors writes it.
        shape: Logical shape.
    """

    source: SyntheticSource
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in pieces of about 16 MiB; each piece is reused by the next."""
        if len(self.shape) < 2:
            yield as_bytes(self.source.read(self.name))
            return
        device, dtype = self.source.device, TORCH_DTYPES[self.dtype]
        rows = max(1, CHUNK_BYTES * self.shape[0] // self.nbytes)
        on_gpu = device.type == "cuda"
        stream = self.source.copy_stream() if on_gpu else None
        shape = (min(rows, self.shape[0]), *self.shape[1:])
        # (On a CPU this context does nothing.) Memory belongs to the stream it was asked on:
        # from another one's, a piece of it may still be in use.
        with torch.cuda.stream(stream):
            made = torch.empty(shape, dtype=dtype, device=device)
        host = torch.empty_like(made, device="cpu", pin_memory=True) if on_gpu else made
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            shard = Shard(0, ((start, stop),), (stop - start, *self.shape[1:]))
            with torch.cuda.stream(stream):
                self.source.fill(self.name, shard, made[: stop - start])
                if stream is not None:
                    host.copy_(made, non_blocking=True)
            if stream is not None:
                stream.synchronize()
            yield as_bytes(host[: stop - start])


def random_token_ids(vocab_size: int, sequences: int, seq_len: int, *, seed: int) -> torch.Tensor:
    """Uniform token ids, int64 [sequences, seq_len]; as reproducible as the weights."""
    first, _ = random_bits(torch.arange(sequences * seq_len), key_of(seed, "token ids"))
    return ((first * vocab_size) >> 32).view(sequences, seq_len)


def _vector_values(name: str, bits: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What a vector of this name holds, in fp64."""
    uniform = (bits[0].double() + 0.5) / 2**32
    normal = sum_of_bytes(*bits).double() / SPREAD
    if name.endswith(".A_log"):
        return (1 + 15 * uniform).log()  # A is 1 to 16, as Mamba-2 initialises it
    if name.endswith(".dt_bias"):
        step = torch.exp(math.log(1e-3) + math.log(100) * uniform)  # 1e-3 to 0.1, likewise
        return step + torch.log(-torch.expm1(-step))  # softplus of it is the step
    if name.endswith(".e_score_correction_bias"):
        return 0.01 * normal
    if name.endswith(".bias"):
        return 0.02 * normal
    return 1 + 0.1 * normal  # norms and D


def _check_fit(location: str, info: TensorHeader, shard: Shard | None) -> None:
    """A matrix is cut along its rows or, where it has only two dims, along its columns."""
    if shard is None or (shard.is_whole and shard.shape == info.shape):
        return
    shape = list(info.shape)
    is_cut = shard.dim == 0 or (shard.dim == 1 and len(shape) == 2)
    if is_cut and all(0 <= start <= stop <= shape[shard.dim] for start, stop in shard.ranges):
        shape[shard.dim] = sum(stop - start for start, stop in shard.ranges)
        if tuple(shape) == shard.shape:
            return
    raise SourceError(
        f"{location}: {info.name}",
        value=f"shape {list(info.shape)}",
        rule=f"a shard {list(shard.shape)} of dim {shard.dim}, ranges {list(shard.ranges)}, "
        "must fit into it",
        remedy="choose another layout",
    )


def _stack(
    members: Sequence[tuple[str, torch.Tensor]],
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Joins matrices [R, ...] of one shape that lie evenly spaced in a buffer to [E, R, C].

    Yields:
        Names of the joined matrices, and a view of them.
    """
    buffers: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, target in members:
        buffers.setdefault(target.untyped_storage().data_ptr(), []).append((name, target))
    for inside in buffers.values():
        inside.sort(key=lambda member: member[1].storage_offset())
        places = [target.storage_offset() for _, target in inside]
        spacings = {after - before for before, after in itertools.pairwise(places)}
        if len(spacings) == 1:
            first_RC = _as_rows(inside[0][1])
            size, stride = (len(inside), *first_RC.shape), (*spacings, *first_RC.stride())
            yield [name for name, _ in inside], first_RC.as_strided(size, stride)
            continue
        for name, target in inside:
            yield [name], _as_rows(target).unsqueeze(0)


def _as_rows(target: torch.Tensor) -> torch.Tensor:
    """A view [R, C] of a tensor of two dims or more."""
    return target if target.dim() == 2 else target.view(target.shape[0], -1)


def _windows(
    shape: tuple[int, ...], shard: Shard | None, stack_ERC: torch.Tensor
) -> Iterator[tuple[Window, torch.Tensor]]:
    """Each range of a shard: where it begins in the whole matrices, and its part of the stack."""
    columns = math.prod(shape[1:])
    if shard is None or shard.is_whole:
        yield Window(columns), stack_ERC
        return
    place = 0
    for start, stop in shard.ranges:
        part = stack_ERC.narrow(1 + shard.dim, place, stop - start)
        place += stop - start
        if shard.dim == 0:
            yield Window(columns, first_row=start), part
        else:
            yield Window(columns, first_column=start), part
