"""The audit of the key set: every tensor that must be there, with its shape and dtype.

In: the architecture, what the configs declare, the place of every tensor. Out: what is missing,
extra, misshapen or of the wrong dtype; and the figures that follow from the headers alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from pipeline.architecture import Architecture, LayerType, TensorSpec
from pipeline.checkpoint.audit_config import Declared
from pipeline.checkpoint.quantization_config import NVFP4_ALGORITHMS
from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.checkpoint.source_check import find_embedding_name, is_mtp
from pipeline.nvfp4.formats import BLOCK_SIZE

FLOATS = ("BF16", "F32", "F16")
_SCALE_SUFFIXES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")


@dataclasses.dataclass(frozen=True)
class Expected:
    """One tensor that must be there.

    Attributes:
        name: Full name.
        dtypes: Accepted dtypes; more than one only for what is copied from the source.
        shape: Stored shape.
        is_passthrough: Whether it is the source's tensor, byte for byte.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    is_passthrough: bool = False


def expected_of(
    architecture: Architecture,
    specs: Sequence[TensorSpec],
    declared: Declared,
    tensors: Mapping[str, TensorInfo],
) -> dict[str, Expected]:
    """The exact key set, `mtp.*` not among it (its names follow no config)."""
    embedding = find_embedding_name(dict(tensors))
    entries: dict[str, Expected] = {}
    for spec in specs:
        algorithm = declared.algorithms.get(spec.module) if spec.is_linear_weight else None
        name = embedding if spec.name.startswith("backbone.embedding") else spec.name
        stored = (
            _quantized(spec, algorithm)
            if algorithm
            else [Expected(name, FLOATS, spec.shape, is_passthrough=True)]
        )
        entries |= {entry.name: entry for entry in stored}
    if declared.kv_cache_fp8:
        for layer in architecture.layers_of(LayerType.attention):
            for letter in "kv":
                name = f"backbone.layers.{layer}.mixer.{letter}_proj.{letter}_scale"
                entries[name] = Expected(name, ("F32",), ())
    return entries


def check_keys(
    expected: Mapping[str, Expected], tensors: Mapping[str, TensorInfo]
) -> tuple[list[str], list[str]]:
    """Missing and extra tensors; then those of a wrong shape or dtype."""
    keys = [f"{name} is missing" for name in expected if name not in tensors]
    keys += [f"{name} is extra" for name in tensors if name not in expected and not is_mtp(name)]
    stored = []
    for name, entry in expected.items():
        info = tensors.get(name)
        if info is None:
            continue
        if info.shape != entry.shape:
            stored.append(f"{name}: shape {list(info.shape)} instead of {list(entry.shape)}")
        if info.dtype not in entry.dtypes:
            stored.append(f"{name}: dtype {info.dtype} instead of {' or '.join(entry.dtypes)}")
    return keys, stored


def check_mtp(architecture: Architecture, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """MTP tensors must be there where config.json promises them, and unquantized."""
    names = [name for name in tensors if is_mtp(name)]
    promised = architecture.num_nextn_predict_layers
    if promised and not names:
        return [
            f"config.json says num_nextn_predict_layers={promised} and there is no mtp.* tensor: "
            "speculative decoding would silently accept nothing"
        ]
    return [
        f"{name}: {tensors[name].dtype}; mtp.* stays as it is in the source"
        for name in names
        if tensors[name].dtype not in FLOATS or name.endswith(_SCALE_SUFFIXES)
    ]


def count_parameters(specs: Sequence[TensorSpec], tensors: Mapping[str, TensorInfo]) -> int:
    """Elements of the original model, embedding, head and MTP included."""
    own = sum(spec.parameters for spec in specs)
    return own + sum(info.elements for name, info in tensors.items() if is_mtp(name))


def effective_bits(parameters: int, tensors: Mapping[str, TensorInfo]) -> float:
    """Stored weight bits over all parameters: weights and block scales, without scalars."""
    stored = sum(info.nbytes for name, info in tensors.items() if info.shape or is_mtp(name))
    return 8 * stored / parameters


def _quantized(spec: TensorSpec, algorithm: str) -> Iterator[Expected]:
    rows, columns = spec.shape
    if algorithm in NVFP4_ALGORITHMS:
        yield Expected(spec.name, ("U8",), (rows, columns // 2))
        yield Expected(f"{spec.name}_scale", ("F8_E4M3",), (rows, columns // BLOCK_SIZE))
        yield Expected(f"{spec.name}_scale_2", ("F32",), ())
    else:
        yield Expected(spec.name, ("F8_E4M3",), spec.shape)
        yield Expected(f"{spec.name}_scale", ("F32",), ())
    if algorithm != "W4A16_NVFP4":
        yield Expected(f"{spec.module}.input_scale", ("F32",), ())
