"""Whether the weights are those that config.json describes, before any work starts.

In: an opened source and the architecture. Out: a `SourceCheck` (which name each logical tensor
has in the source, the MTP tensors), or one error that counts everything that is wrong.

What may have which dtype. A linear weight, which may be quantized and whose scales are computed,
must be BF16; F16 and F32 are accepted with `cast` and rounded to BF16 first, because a scale
chosen from other values would not be the published method's. Everything else is only copied
through as it is, so it may be BF16 or F32 (NVIDIA stores router, `A_log` and `D` in F32), or F16
with `cast`.
"""

from __future__ import annotations

import dataclasses

from pipeline.architecture import Architecture, TensorSpec, expected_tensors
from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.checkpoint.source import FileSource, first_five
from pipeline.errors import SourceError

# NVIDIA's name first; transformers 5 saves the second.
EMBEDDING_NAMES = ("backbone.embeddings.weight", "backbone.embedding.weight")

_SCALE_SUFFIXES = (
    "_scale",
    "_scale_2",
    "_scale_inv",
    ".scales",
    ".qzeros",
    ".weight_packed",
    ".qweight",
)
_QUANTIZED_DTYPES = {"U8", "I8", "F8_E4M3", "F8_E5M2"}


@dataclasses.dataclass(frozen=True)
class SourceCheck:
    """A source that fits its architecture.

    Attributes:
        specs: The expected tensors, `mtp.*` not among them, in the order of the forward pass.
        embedding_name: The name that the embedding has in this source.
        mtp: Names of the `mtp.*` tensors, which are copied through.
    """

    specs: tuple[TensorSpec, ...]
    embedding_name: str
    mtp: tuple[str, ...]

    def source_name(self, spec: TensorSpec) -> str:
        """The name of a tensor in the source (only the embedding has two spellings)."""
        return self.embedding_name if spec.name in EMBEDDING_NAMES else spec.name


def check_source(
    source: FileSource, architecture: Architecture, *, cast: bool = False
) -> SourceCheck:
    """Compares the source with what its config.json promises.

    Args:
        source: The opened checkpoint.
        architecture: From its config.json.
        cast: Whether F16 and F32 linear weights are accepted (and rounded to BF16).

    Raises:
        SourceError: Already quantized; missing, extra or misshapen tensors; MTP tensors absent;
            a head beside tied embeddings; a dtype that is not accepted.
    """
    _refuse_quantized(source)
    embedding_name = find_embedding_name(source.tensors)
    specs = expected_tensors(architecture)
    check = SourceCheck(
        tuple(specs), embedding_name, tuple(name for name in source.tensors if is_mtp(name))
    )
    if architecture.tie_word_embeddings and "lm_head.weight" in source.tensors:
        raise SourceError(
            f"{source.directory}: lm_head.weight",
            value="present, while config.json says tie_word_embeddings=true",
            rule="servers would ignore this head and use the embedding",
            remedy="set tie_word_embeddings to false, or remove the tensor",
        )
    _check_names_and_shapes(source, check)
    promised = architecture.num_nextn_predict_layers
    if promised > 0 and not check.mtp:
        raise SourceError(
            f"{source.directory}: mtp.*",
            value="no such tensor",
            rule=f"config.json says num_nextn_predict_layers={promised}; "
            "without them speculative decoding silently accepts nothing",
            remedy="fetch the whole checkpoint, or set num_nextn_predict_layers to 0",
        )
    _check_dtypes(source, check, cast=cast)
    return check


def is_mtp(name: str) -> bool:
    """Whether a tensor or module belongs to the multi-token-prediction block."""
    return name.startswith("mtp.")


def find_embedding_name(tensors: dict[str, TensorInfo]) -> str:
    """The spelling of the embedding in these tensors; NVIDIA's where there is none."""
    return next((name for name in EMBEDDING_NAMES if name in tensors), EMBEDDING_NAMES[0])


def _refuse_quantized(source: FileSource) -> None:
    signs = [
        f"config.json has {key}"
        for key in ("quantization_config", "compression_config")
        if source.config.get(key)
    ]
    if (source.directory / "hf_quant_config.json").exists():
        signs.append("hf_quant_config.json exists")
    dtypes = [info for info in source.tensors.values() if info.dtype in _QUANTIZED_DTYPES]
    if dtypes:
        signs.append(f"{len(dtypes)} tensors are 8-bit, the first {dtypes[0].name}")
    scales = [name for name in source.tensors if name.endswith(_SCALE_SUFFIXES)]
    if scales:
        signs.append(f"{len(scales)} tensors are scales, the first {scales[0]}")
    if signs:
        raise SourceError(
            str(source.directory),
            value="an already quantized checkpoint: " + "; ".join(signs),
            rule="the source must be the original BF16 checkpoint",
            remedy="point checkpoint= at the BF16 model",
        )


def _check_names_and_shapes(source: FileSource, check: SourceCheck) -> None:
    expected = {check.source_name(spec): spec for spec in check.specs}
    missing = [name for name in expected if name not in source.tensors]
    extra = [name for name in source.tensors if name not in expected and not is_mtp(name)]
    misshapen = [
        f"{name} {list(source.tensors[name].shape)} instead of {list(spec.shape)}"
        for name, spec in expected.items()
        if name in source.tensors and source.tensors[name].shape != spec.shape
    ]
    found = [
        f"{len(names)} {what} ({first_five(names)})"
        for what, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if found:
        raise SourceError(
            f"{source.directory}: tensors",
            value="; ".join(found),
            rule="the tensors must be exactly those that config.json describes",
            remedy="fetch the whole checkpoint, and the config.json that belongs to it",
        )


def _check_dtypes(source: FileSource, check: SourceCheck, *, cast: bool) -> None:
    linear = {"BF16", "F16", "F32"} if cast else {"BF16"}
    other = {"BF16", "F32", "F16"} if cast else {"BF16", "F32"}
    wrong = []
    for spec in check.specs:
        info = source.tensors[check.source_name(spec)]
        if info.dtype not in (linear if spec.is_linear_weight else other):
            wrong.append(f"{info.name} {info.dtype}")
    wrong += [
        f"{name} {source.tensors[name].dtype}"
        for name in check.mtp
        if source.tensors[name].dtype not in other
    ]
    if wrong:
        castable = all(entry.endswith((" F16", " F32")) for entry in wrong)
        raise SourceError(
            f"{source.directory}: dtypes",
            value=f"{len(wrong)} tensors: {first_five(wrong)}",
            rule="linear weights must be BF16, other tensors BF16 or F32",
            remedy="say cast=true to round F16 and F32 weights to BF16 first"
            if castable and not cast
            else "point checkpoint= at the BF16 model",
        )
