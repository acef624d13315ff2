"""A quantized checkpoint as a server reads it: values of its weights, scales of its inputs.

In: a finished directory, ours or Model Optimizer's. Out: any rank's shard of any tensor, its values
where it is quantized, and the static input scales of each layer. Formats come from config.json, in
either spelling, and only the bytes of the shard at hand are read: codes are K/2 wide and block
scales K/16, so a cut along K lies between two blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.architecture import (
    Architecture,
    LayerType,
    TensorSpec,
    expected_tensors,
    layer_tensors,
)
from pipeline.checkpoint.audit import AuditResult, audit
from pipeline.checkpoint.audit_config import Declared, read_declared
from pipeline.checkpoint.quantization_config import NVFP4_ALGORITHMS
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.checkpoint.source_check import EMBEDDING_NAMES, find_embedding_name
from pipeline.errors import AuditError, LayoutError, SourceError
from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.scales import InputScale
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import BLOCK_SIZE, HOPPER_FLUSH_BELOW, Format
from pipeline.nvfp4.reference import PackedWeight
from pipeline.schedule import tap_of
from pipeline.sharding import ParallelDims, Shard, shard_of

WEIGHT_ONLY = "W4A16_NVFP4"

# What may differ between a source and what was made of it: the block that is never calibrated.
_MTP_FIELDS = frozenset({"num_nextn_predict_layers", "mtp_layers"})


@dataclasses.dataclass(frozen=True)
class StoredShard:
    """One rank's part of a tensor, as it is stored, on the CPU.

    Attributes:
        algorithm: Model Optimizer's name of how the tensor is quantized; None where it is not.
        weight: Codes, or values.
        block_scales: NVFP4 only: float8_e4m3fn [N, K/16].
        scale: `weight_scale_2` of NVFP4, `weight_scale` of FP8; 1 otherwise.
    """

    algorithm: str | None
    weight: torch.Tensor
    block_scales: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def flushes(self) -> bool:
        """Whether Hopper's kernels flush a block scale of it."""
        return self.block_scales is not None and bool(_is_flushed(self.block_scales).any())


class QuantizedCheckpoint:
    """An opened directory.

    Args:
        directory: A finished checkpoint.
        audited: Audit it first; of several ranks, one is enough.

    Raises:
        AuditError: What the audit refuses: broken names, missing tensors, no quantization ...
        SourceError: Its files cannot be read.
    """

    def __init__(self, directory: Path, *, audited: bool = True) -> None:
        self.audit: AuditResult | None = None
        if audited:
            self.audit = audit(directory)
            self.audit.raise_if_failed()
        self._files: FileSource = open_source(directory)
        self.architecture = Architecture.from_hf_config(self._files.config)
        self._declared = _declared(self._files, self.architecture)
        self._embedding = find_embedding_name(self._files.tensors)
        self._unequal: dict[tuple[int, str], tuple[float, float]] = {}

    @property
    def files(self) -> FileSource:
        """Where its tensors lie."""
        return self._files

    def check_architecture(self, source: Architecture, location: str) -> None:
        """Refuses a source of another shape.

        Raises:
            SourceError: The two config.json describe different models.
        """
        ours, theirs = dataclasses.asdict(self.architecture), dataclasses.asdict(source)
        differing = [
            f"{name} {_short(ours[name])}, source {_short(theirs[name])}"
            for name in ours
            if name not in _MTP_FIELDS and ours[name] != theirs[name]
        ]
        if differing:
            raise SourceError(
                f"{self._files.location}: config.json",
                value="; ".join(differing),
                rule=f"must have the shape of its source {location}",
                remedy="give source= the BF16 checkpoint that this directory was made from",
            )

    def check_layout(self, dims: ParallelDims, rank: int) -> None:
        """Refuses degrees that cut a block of 16 in two.

        Raises:
            LayoutError: Some NVFP4 weight's K is cut elsewhere than between two blocks.
        """
        for spec in expected_tensors(self.architecture):
            if self.algorithm(spec) not in NVFP4_ALGORITHMS:
                continue
            shard = shard_of(spec, self.architecture, dims, rank)
            if shard is not None and shard.dim == 1 and shard.shape[1] % BLOCK_SIZE:
                axis = "etp" if spec.is_routed_expert else "tp"
                degree = getattr(dims, axis)
                raise LayoutError(
                    spec.name,
                    value=f"K={spec.shape[1]} / {axis}={degree} = {spec.shape[1] / degree:g}",
                    rule=f"is not a multiple of {BLOCK_SIZE}: a block never crosses a shard",
                    remedy=f"lower parallel.{axis}",
                )

    @property
    def algorithms(self) -> Mapping[str, str]:
        """Model Optimizer's name of how each quantized projection is stored, by module."""
        return self._declared.algorithms

    def algorithm(self, spec: TensorSpec) -> str | None:
        """Model Optimizer's name of how a tensor is quantized; None where it is not."""
        return self._declared.algorithms.get(spec.module) if spec.is_linear_weight else None

    def layer_algorithms(self, layer: int) -> tuple[tuple[str, str], ...]:
        """What is quantized in a layer, and how: sorted pairs of tap name and algorithm."""
        pairs = {
            (tap_of(spec.module), algorithm)
            for spec in layer_tensors(self.architecture, layer)
            if (algorithm := self.algorithm(spec))
        }
        return tuple(sorted(pairs))

    def fetch(self, spec: TensorSpec, shard: Shard | None = None) -> StoredShard:
        """Reads one shard, or the whole tensor, from the files; threads may do it at once.

        Raises:
            SourceError: Missing, misshapen, or the file ended early.
        """
        algorithm = self.algorithm(spec)
        name = self._embedding if spec.name in EMBEDDING_NAMES else spec.name
        if algorithm in NVFP4_ALGORITHMS:
            return StoredShard(
                algorithm,
                self._files.read(name, _narrowed(shard, 2)),
                self._files.read(f"{name}_scale", _narrowed(shard, BLOCK_SIZE)),
                self._scalar(f"{name}_scale_2"),
            )
        weight = self._files.read(name, shard)
        scale = 1.0 if algorithm is None else self._scalar(f"{name}_scale")
        return StoredShard(algorithm, weight, None, scale)

    def read(
        self,
        spec: TensorSpec,
        shard: Shard | None,
        mode: ServingMode,
        device: torch.device | None = None,
        backend: str = "reference",
    ) -> torch.Tensor:
        """What a server multiplies with: `dequantize` of `fetch`."""
        return dequantize(self.fetch(spec, shard), mode, device or torch.device("cpu"), backend)

    def layer_scales(self, layer: int) -> Mapping[str, InputScale]:
        """The static scales of a layer's inputs, keys and values, by tap name.

        Of several projections that a server feeds one input (all experts; q, k and v) the largest
        scale counts, as in vLLM; `notes` says where experts differ.
        """
        found: dict[str, InputScale] = {}
        smallest: dict[str, float] = {}
        for spec in layer_tensors(self.architecture, layer):
            algorithm = self.algorithm(spec)
            if algorithm is None or algorithm == WEIGHT_ONLY:
                continue
            tap = tap_of(spec.module)
            scale = self._scalar(f"{spec.module}.input_scale")
            kind = Format.nvfp4 if algorithm in NVFP4_ALGORITHMS else Format.fp8
            known = found.get(tap)
            found[tap] = InputScale(kind, max(scale, known.scale if known else scale))
            smallest[tap] = min(scale, smallest.get(tap, scale))
        for tap, least in smallest.items():
            if least < found[tap].scale:
                self._unequal[layer, tap] = (least, found[tap].scale)
        is_attention = self.architecture.layers[layer] is LayerType.attention
        if self._declared.kv_cache_fp8 and is_attention:
            for letter in "kv":
                name = f"backbone.layers.{layer}.mixer.{letter}_proj.{letter}_scale"
                found[f"{letter}_cache"] = InputScale(Format.fp8, self._scalar(name))
        return found

    def notes(self) -> list[str]:
        """What a reader of the figures should know about the scales that were given out."""
        if not self._unequal:
            return []
        (layer, tap), (least, largest) = next(iter(self._unequal.items()))
        layers = len({layer for layer, _ in self._unequal})
        return [
            f"input scales differ between the experts of {layers} layers (first: layer {layer} "
            f"{tap}, {least:.4g} to {largest:.4g}); the largest counts, as in vLLM"
        ]

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def _scalar(self, name: str) -> float:
        return float(self._files.read(name))


def dequantize(
    stored: StoredShard, mode: ServingMode, device: torch.device, backend: str = "reference"
) -> torch.Tensor:
    """The values that a stored shard stands for, on `device`.

    Args:
        stored: What `QuantizedCheckpoint.fetch` gave.
        mode: In `w4a16`, NVFP4 block scales below 2**-6 are flushed to zero, and so their blocks.
        device: Where to compute.
        backend: Name of what computes (`pipeline.nvfp4.backends`).

    Returns:
        fp32 where quantized; as stored otherwise.
    """
    weight = stored.weight.to(device)
    if stored.algorithm is None:
        return weight
    if stored.block_scales is None:
        return weight.float().mul_(stored.scale)
    scales = stored.block_scales.to(device)
    if mode is ServingMode.w4a16:
        scales = scales.view(torch.uint8).masked_fill(_is_flushed(scales), 0).view(scales.dtype)
    scale_2 = torch.tensor(stored.scale, dtype=torch.float32, device=device)
    return get_backend(backend).dequantize_nvfp4(PackedWeight(weight, scales, scale_2))


def _is_flushed(block_scales: torch.Tensor) -> torch.Tensor:
    return block_scales.float() < HOPPER_FLUSH_BELOW


def _declared(files: FileSource, architecture: Architecture) -> Declared:
    """What config.json says; ranks that did not audit refuse here what they cannot read."""
    quantization = files.config.get("quantization_config")
    problems = ["config.json has no quantization_config"]
    if isinstance(quantization, dict):
        declared, problems = read_declared(quantization, expected_tensors(architecture))
        if not problems:
            return declared
    raise AuditError(
        files.location,
        value="; ".join(problems),
        rule="must be a quantized checkpoint that servers can read",
        remedy="python -m launch.verify names everything that is wrong with it",
    )


def _narrowed(shard: Shard | None, divisor: int) -> Shard | None:
    """The same part of a tensor whose K is `divisor` times smaller; None for all of it."""
    if shard is None or shard.is_whole:
        return None
    assert len(shard.shape) == 2
    rows, columns = shard.shape
    ranges = shard.ranges
    if shard.dim == 1:
        assert all(edge % BLOCK_SIZE == 0 for pair in ranges for edge in pair), ranges
        ranges = tuple((start // divisor, stop // divisor) for start, stop in ranges)
    return dataclasses.replace(shard, ranges=ranges, shape=(rows, columns // divisor))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"of {len(value)}" if isinstance(value, tuple) else text
