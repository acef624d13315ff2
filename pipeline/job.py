"""One job, completely decided before any weight is read.

In: the source (or a config alone), a recipe, the degrees of parallelism. Out: a `Job`: the format
of every module, the schedule of every layer, who copies what, and every reason to refuse. Both
`launch.plan` and `launch.calibrate` build it the same way, so the plan cannot promise what the
sweep does not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from pipeline.architecture import Architecture, TensorSpec, expected_tensors, mtp_tensors
from pipeline.checkpoint.quantization_config import (
    QuantizationConfigs,
    build_quantization_configs,
    unquantized_modules,
)
from pipeline.errors import LayersweepError, LayoutError, RecipeError
from pipeline.nvfp4.formats import BLOCK_SIZE, Format
from pipeline.recipe import Recipe, Resolution, modules_of, resolve
from pipeline.schedule import LayerSchedule, schedule_layers, spread
from pipeline.sharding import ParallelDims, check_layout, shard_of

MTP = "mtp*"
BYTES_OF = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "I32": 4, "I64": 8}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of the source, as stored.

    Attributes:
        name: Its name in the source.
        dtype: As safetensors spells it.
        shape: Logical shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.parameters * BYTES_OF[self.dtype]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is decided before the sweep.

    Attributes:
        architecture: Shape of the model.
        dims: The rank grid.
        recipe: What the user asked for.
        resolution: What that comes to, module by module.
        specs: Every tensor but `mtp.*`, in model order.
        stored: The source's tensors, by the names of `specs` (and `mtp.*`).
        schedules: The work of each layer.
        outer: Tensors outside the layers, copied whole: name and the rank that copies it.
    """

    architecture: Architecture
    dims: ParallelDims
    recipe: Recipe
    resolution: Resolution
    specs: tuple[TensorSpec, ...]
    stored: Mapping[str, StoredTensor]
    schedules: tuple[LayerSchedule, ...]
    outer: tuple[tuple[str, int], ...]


def estimate_stored(architecture: Architecture) -> dict[str, StoredTensor]:
    """The source's tensors where only a config is known: BF16, the router's gate in FP32."""
    specs = [*expected_tensors(architecture), *mtp_tensors(architecture)]
    return {
        spec.name: StoredTensor(
            spec.name, "F32" if spec.module.endswith(".gate") else "BF16", spec.shape
        )
        for spec in specs
    }


def build_job(
    architecture: Architecture,
    dims: ParallelDims,
    recipe: Recipe,
    stored: Mapping[str, StoredTensor],
) -> Job:
    """Decides everything.

    Raises:
        RecipeError: The recipe asks for something that is not supported on this model.
    """
    specs = tuple(expected_tensors(architecture))
    resolution = resolve(recipe, modules_of(specs))
    schedules = schedule_layers(architecture, dims, resolution.formats, resolution.kv)
    outer = [name for name in stored if not name.startswith("backbone.layers.")]
    ranks = spread((stored[name].nbytes for name in outer), dims.world)
    return Job(
        architecture,
        dims,
        recipe,
        resolution,
        specs,
        stored,
        tuple(schedules),
        tuple(zip(outer, ranks, strict=True)),
    )


def quantization_configs(job: Job) -> QuantizationConfigs:
    """What config.json and hf_quant_config.json will say.

    Raises:
        RecipeError: No loader could read the mixture of formats, or nothing is quantized.
    """
    formats = {
        module: (module_format.weight_format, module_format.input_format)
        for module, module_format in job.resolution.formats.items()
        if module_format.is_quantized
    }
    unquantized = unquantized_modules(job.architecture, formats)
    if MTP not in unquantized and any(name.startswith("mtp.") for name in job.stored):
        unquantized.append(MTP)  # config.json does not promise them, and they are there
    return build_quantization_configs(formats, unquantized, kv_cache_fp8=bool(job.resolution.kv))


def find_refusals(job: Job, seq_len: int) -> list[LayersweepError]:
    """Every reason not to start, whatever the weights hold; an empty list means go."""
    refusals: list[LayersweepError] = [*check_layout(job.architecture, job.dims)]
    try:
        quantization_configs(job)
    except RecipeError as error:
        refusals.append(error)
    if not any(isinstance(error, LayoutError) for error in refusals):
        refusals += _check_blocks(job)
    if job.resolution.needs_forward and seq_len % job.dims.tp:
        nearest = max(seq_len // job.dims.tp, 1) * job.dims.tp
        refusals.append(
            LayoutError(
                "calibration.seq_len",
                value=seq_len,
                rule=f"sequence parallelism cuts sequences by parallel.tp={job.dims.tp}",
                remedy=f"use calibration.seq_len={nearest}",
            )
        )
    return refusals


def _check_blocks(job: Job) -> list[LayersweepError]:
    """K of every NVFP4 weight must stay a multiple of 16 on each rank; one error per projection."""
    found: dict[str, LayersweepError] = {}
    for spec in job.specs:
        module_format = job.resolution.formats.get(spec.module)
        if module_format is None or module_format.weight_format is not Format.nvfp4:
            continue
        kind = ".".join(part for part in spec.module.split(".") if not part.isdigit())
        if kind in found or not spec.is_linear_weight:
            continue
        columns = spec.shape[1]
        if columns % BLOCK_SIZE:
            found[kind] = RecipeError(
                spec.name,
                value=f"K={columns}",
                rule=f"NVFP4 needs in_features that are a multiple of {BLOCK_SIZE}",
                remedy=f"leave '*{spec.module.rpartition('.')[2]}*' unquantized in the recipe",
            )
            continue
        axis, degree = ("etp", job.dims.etp) if spec.is_routed_expert else ("tp", job.dims.tp)
        at_rank = 0 if not spec.is_routed_expert else _holder(spec, job)
        shard = shard_of(spec, job.architecture, job.dims, at_rank)
        if shard is not None and shard.shape[1] % BLOCK_SIZE:
            best = max(d for d in range(1, degree) if columns % (d * BLOCK_SIZE) == 0)
            found[kind] = LayoutError(
                spec.name,
                value=f"K={columns} / {axis}={degree} = {columns / degree:g}",
                rule=f"is not a multiple of {BLOCK_SIZE}: a block never crosses a shard",
                remedy=f"use parallel.{axis} <= {best}",
            )
    return list(found.values())


def _holder(spec: TensorSpec, job: Job) -> int:
    """The first rank that holds a routed expert."""
    return spec.expert // (job.architecture.n_routed_experts // job.dims.ep) * job.dims.etp
