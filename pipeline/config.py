"""The schemas of the three commands, and the rules between their fields.

In: Hydra's composed configuration. Out: plain dataclasses; below the entry points nothing knows
OmegaConf. `recipe`, `model` and `data` are names or paths that are looked up, not Hydra groups, so
that any Model Optimizer recipe, any checkpoint and any file can stand there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from pipeline.calibration.data import DataSource
from pipeline.calibration.token_file import is_token_file
from pipeline.config_parts import (
    CalibrationConfig,
    EvaluationConfig,
    ParallelConfig,
    SnapshotConfig,
)
from pipeline.errors import ConfigError

__all__ = [
    "DISCARD",
    "REHEARSAL_DIRECTORY",
    "REPORT_DIRECTORY",
    "SYNTHETIC",
    "CalibrateConfig",
    "CalibrationConfig",
    "ComputeDtype",
    "Device",
    "EvaluationConfig",
    "HiddenStorage",
    "Kernels",
    "ParallelConfig",
    "PlanConfig",
    "PlanOutput",
    "VerifyConfig",
    "data_sources",
    "read_yaml",
    "register_schemas",
    "to_dataclass",
    "to_yaml",
]


class ComputeDtype(Enum):
    """Dtype of the calibration forward pass; `auto` is float32 on CPU and bfloat16 on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(Enum):
    """Where the sweep runs; `auto` takes the GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Kernels(Enum):
    """What packs NVFP4 weights; `auto` is Triton kernels on a GPU and plain torch on a CPU."""

    auto = "auto"
    reference = "reference"
    triton = "triton"


class HiddenStorage(Enum):
    """Where hidden states stay between layers; `auto` takes the device if they fit there."""

    auto = "auto"
    device = "device"
    host = "host"


class PlanOutput(Enum):
    """How `launch.plan` answers."""

    table = "table"
    json = "json"


SYNTHETIC = "synthetic"
"""In the place of a checkpoint: random weights of a model's shape."""
DISCARD = "discard"
"""In the place of an output: write no checkpoint."""
REPORT_DIRECTORY = "layersweep"
"""Of the reports, in a finished checkpoint."""
REHEARSAL_DIRECTORY = "layersweep-rehearsal"
"""Of the reports where no checkpoint is written, unless `report` says otherwise."""


@dataclass(kw_only=True)
class CalibrateConfig:
    """Options of `launch.calibrate`; each is explained in conf/job/calibrate.yaml."""

    checkpoint: str = MISSING
    output: str = MISSING
    recipe: str = MISSING
    model: str | None = None
    synthetic_seed: int = 0
    report: str | None = None
    data: Any = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute_dtype: ComputeDtype = ComputeDtype.auto
    device: Device = Device.auto
    kernels: Kernels = Kernels.auto
    hidden_store: HiddenStorage = HiddenStorage.auto
    read_threads: int = 8
    read_ahead_gb: float | None = None
    write_threads: int = 4
    cast: bool = False
    verify_source: bool = False
    allow_bad_loss: bool = False
    clamp_kv_scales: bool = True
    unobserved_input_scale: float | None = None
    compare_to_max: bool = True
    max_shard_gb: float = 1.0
    timeout_minutes: int = 60
    failure_seconds: float = 60.0
    stall_minutes: float = 15.0
    stop_seconds: float = 25.0
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    progress_seconds: float = 5.0
    verbose: bool = False

    def __post_init__(self) -> None:
        """Checks numbers that stand alone, then the rules between fields."""
        scale = self.unobserved_input_scale
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ConfigError(
                "unobserved_input_scale",
                value=scale,
                rule="must be a positive finite number",
                remedy="leave it out to refuse projections that no token reached",
            )
        for name in (
            *("max_shard_gb", "timeout_minutes"),
            *("failure_seconds", "stall_minutes", "stop_seconds"),
            *("read_threads", "read_ahead_gb", "write_threads"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    name, value=value, rule="must be positive and finite", remedy="change it"
                )
        self._check_rehearsal()

    @property
    def is_synthetic(self) -> bool:
        """Whether the weights are made up."""
        return self.checkpoint == SYNTHETIC

    @property
    def discards_output(self) -> bool:
        """Whether no checkpoint is written."""
        return self.output == DISCARD

    @property
    def report_directory(self) -> Path:
        """Where the reports will lie."""
        if self.discards_output:
            return Path(self.report or REHEARSAL_DIRECTORY)
        return Path(self.output) / REPORT_DIRECTORY

    def _check_rehearsal(self) -> None:
        """What goes with made-up weights, and with an output that is discarded."""
        if self.is_synthetic and self.model is None:
            raise ConfigError(
                "model",
                value="nothing",
                rule=f"checkpoint={SYNTHETIC} makes random weights of a model's shape",
                remedy="model=NAME (see conf/model/), or model=PATH of a config.json",
            )
        if self.model is not None and not self.is_synthetic:
            raise ConfigError(
                "model",
                value=self.model,
                rule="the shape of a checkpoint is in its own config.json",
                remedy=f"leave model out, or use checkpoint={SYNTHETIC} for random weights",
            )
        if self.is_synthetic and self.data is not None and not is_token_file(str(self.data)):
            raise ConfigError(
                "data",
                value=self.data,
                rule=f"checkpoint={SYNTHETIC} has no tokenizer for text",
                remedy="leave data out for random token ids, or give data=FILE.npy of token ids",
            )
        if self.is_synthetic and self.evaluation.has_gates:
            raise ConfigError(
                "evaluation",
                value="gates",
                rule="what is measured on random weights says nothing",
                remedy=f"leave them out with checkpoint={SYNTHETIC}",
            )
        if self.report is not None and not self.discards_output:
            raise ConfigError(
                "report",
                value=self.report,
                rule=f"a checkpoint carries its report, in OUTPUT/{REPORT_DIRECTORY}",
                remedy=f"leave report out; it goes with output={DISCARD}",
            )


@dataclass(kw_only=True)
class PlanConfig:
    """Options of `launch.plan`; each is explained in conf/job/plan.yaml."""

    checkpoint: str | None = None
    model: str | None = None
    recipe: str = MISSING
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute_dtype: ComputeDtype = ComputeDtype.bfloat16
    device_gib: float | None = 79.0
    hidden_store: HiddenStorage = HiddenStorage.auto
    max_shard_gb: float = 1.0
    cast: bool = False
    output: PlanOutput = PlanOutput.table

    def __post_init__(self) -> None:
        """Exactly one of checkpoint and model says what to plan; a GPU has some memory."""
        for name in ("device_gib", "max_shard_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    name, value=value, rule="must be positive and finite", remedy="change it"
                )
        if self.checkpoint == SYNTHETIC:
            raise ConfigError(
                "checkpoint",
                value=self.checkpoint,
                rule="a plan needs no weights, not even random ones",
                remedy="model=NAME alone says what to plan (see conf/model/)",
            )
        if (self.checkpoint is None) == (self.model is None):
            raise ConfigError(
                "checkpoint, model",
                value=f"checkpoint={self.checkpoint} model={self.model}",
                rule="exactly one of them says what to plan",
                remedy="checkpoint=DIR for a checkpoint, model=NAME for a known shape "
                "(see conf/model/)",
            )


@dataclass(kw_only=True)
class VerifyConfig:
    """Options of `launch.verify`; each is explained in conf/job/verify.yaml."""

    directory: str | None = None
    source: str | None = None
    hopper: bool = False
    output: PlanOutput = PlanOutput.table


SCHEMAS = {"calibrate": CalibrateConfig, "plan": PlanConfig, "verify": VerifyConfig}


def register_schemas(conf_dir: Path) -> None:
    """Tells Hydra the schemas, under the names that the defaults lists of conf/ use.

    Also a resolver for help texts: `${presets:recipe}` lists the names in conf/recipe.
    """

    def list_presets(group: str) -> str:
        return ", ".join(sorted(path.stem for path in (conf_dir / group).glob("*.yaml")))

    OmegaConf.register_new_resolver("presets", list_presets, replace=True)
    store = ConfigStore.instance()
    from pipeline.config_compare import CompareConfig
    from pipeline.config_evaluate import EvaluateConfig

    for name, schema in {
        **SCHEMAS,
        "compare": CompareConfig,
        "evaluate": EvaluateConfig,
    }.items():
        store.store(name=f"{name}_schema", node=schema)


def to_dataclass(config: DictConfig) -> Any:
    """The dataclass behind a composed configuration.

    Raises:
        ConfigError: A mandatory option is missing.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            ", ".join(missing),
            value="nothing",
            rule="these options are mandatory",
            remedy="give them on the command line as " + " ".join(f"{key}=..." for key in missing),
        )
    return OmegaConf.to_object(config)


def to_yaml(config: DictConfig) -> str:
    """The resolved configuration, to be saved beside the checkpoint."""
    return OmegaConf.to_yaml(config, resolve=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as plain values."""
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(values, dict), path
    return {str(key): value for key, value in values.items()}


def data_sources(data: Any, presets: Path) -> list[DataSource]:
    """Reads `data`: a name, a path, or a list of these or of mappings with weights.

    Args:
        data: What the user wrote.
        presets: Directory of named data mixtures (conf/data).

    Raises:
        ConfigError: Something else than a string, a mapping or a list of them.
    """
    sources: list[DataSource] = []
    known = {f.name for f in fields(DataSource)}
    for item in data if isinstance(data, list) else [data]:
        if isinstance(item, str) and (preset := presets / f"{item}.yaml").is_file():
            sources += [DataSource(**source) for source in read_yaml(preset)["sources"]]
        elif isinstance(item, str):
            sources.append(DataSource(path=item))
        elif isinstance(item, dict) and set(item) <= known and "path" in item:
            sources.append(DataSource(**item))
        else:
            raise ConfigError(
                "data",
                value=repr(item),
                rule=f"a source is a path, or a mapping of path and {sorted(known - {'path'})}",
                remedy="data=FILE or data='[{path: A.jsonl, weight: 2}, {path: B.jsonl}]'",
            )
    return sources
