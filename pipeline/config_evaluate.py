"""Options of `launch.evaluate`: two checkpoints and text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.config import ComputeDtype, Device, EvaluationConfig, ParallelConfig, PlanOutput
from pipeline.errors import ConfigError


@dataclass(kw_only=True)
class EvaluateConfig:
    """Options of `launch.evaluate`; each is explained in conf/job/evaluate.yaml."""

    directory: str | None = None
    source: str = ""
    data: Any = None
    skip_sequences: int = 0
    seq_len: int = 4096
    seed: int = 0
    micro_batch: int = 1
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(group_sequences=0)
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute_dtype: ComputeDtype = ComputeDtype.auto
    device: Device = Device.auto
    cast: bool = False
    read_threads: int = 8
    timeout_minutes: int = 60
    progress_seconds: float = 5.0
    verbose: bool = False
    output: PlanOutput = PlanOutput.table
    report: str | None = None

    def __post_init__(self) -> None:
        """Checks numbers that stand alone, and that there is text, said once."""
        if not self.source:
            raise ConfigError(
                "source",
                value="nothing",
                rule="what was lost is measured against the BF16 checkpoint",
                remedy="source=DIR, a Hub id, or demo",
            )
        least_of = {"seq_len": 2, "skip_sequences": 0, "seed": 0}
        least_of |= dict.fromkeys(("micro_batch", "read_threads", "timeout_minutes"), 1)
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    name,
                    value=getattr(self, name),
                    rule=f"must be at least {least}",
                    remedy="raise it",
                )
        if self.evaluation.num_sequences < 1:
            raise ConfigError(
                "evaluation.num_sequences",
                value=self.evaluation.num_sequences,
                rule="an evaluation needs text",
                remedy="leave it out for 8 sequences",
            )
        if self.evaluation.group_sequences:
            raise ConfigError(
                "evaluation.group_sequences",
                value=self.evaluation.group_sequences,
                rule="only launch.calibrate tells which group hurts",
                remedy="leave it out",
            )
        if (self.data is None) == (self.evaluation.data is None):
            raise ConfigError(
                "data",
                value="nothing" if self.data is None else f"{self.data} and evaluation.data",
                rule="one text to evaluate on, which the checkpoint was not calibrated on",
                remedy="data=FILE, a directory or a Hub dataset, or FILE.npy of token ids",
            )

    @property
    def text(self) -> Any:
        """What to evaluate on, whichever option said it."""
        return self.evaluation.data if self.data is None else self.data
