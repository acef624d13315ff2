"""Groups of options: the layout, the calibration, the evaluation, the snapshots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.sharding import ParallelDims

MOST_SEQUENCES = 2**20
"""Beyond it no memory holds even the token ids of long sequences."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; `world` comes from the launcher, only `launch.plan` reads it here."""

    tp: int = 1
    ep: int | None = None
    etp: int = 1
    world: int | None = None

    def dims(self, world: int, experts: int) -> ParallelDims:
        """The rank grid; `ep=null` takes the largest degree that divides ranks and experts.

        Raises:
            LayoutError: The degrees do not multiply to the number of ranks.
        """
        ep = self.ep
        if ep is None:
            ep = math.gcd(world // self.etp, experts) if experts and self.etp > 0 else 1
        return ParallelDims(world=world, tp=self.tp, ep=ep, etp=self.etp)


@dataclass(kw_only=True)
class CalibrationConfig:
    """How much text runs through the model, and how it is cut."""

    num_sequences: int = 512
    seq_len: int = 4096
    micro_batch: int | None = None
    seed: int = 0
    loss_sequences: int = 8

    def __post_init__(self) -> None:
        """Checks each number on its own."""
        for item, least in (
            ("num_sequences", 1),
            ("seq_len", 2),
            ("micro_batch", 1),
            ("loss_sequences", 1),
        ):
            value = getattr(self, item)
            if value is not None and value < least:
                raise ConfigError(
                    f"calibration.{item}",
                    value=value,
                    rule=f"must be at least {least}",
                    remedy="raise it",
                )
        if self.num_sequences > MOST_SEQUENCES:
            raise _too_many("calibration.num_sequences", self.num_sequences)


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is measured of the quantized model, and what it must reach."""

    num_sequences: int = 8
    data: Any = None
    group_sequences: int = 1
    group_seq_len: int = 512
    max_kl: float | None = None
    min_top1: float | None = None
    max_perplexity_ratio: float | None = None

    def __post_init__(self) -> None:
        """Checks each number on its own, and that a gate has something to measure."""
        for name, least in (("num_sequences", 0), ("group_sequences", 0), ("group_seq_len", 2)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"evaluation.{name}",
                    value=getattr(self, name),
                    rule=f"must be at least {least}",
                    remedy={
                        "num_sequences": "0 leaves the evaluation out",
                        "group_sequences": "0 leaves the groups out",
                    }.get(name, "raise it"),
                )
        if self.num_sequences > MOST_SEQUENCES:
            raise _too_many("evaluation.num_sequences", self.num_sequences)
        for name, lowest, highest in (
            ("max_kl", 0.0, math.inf),
            ("min_top1", 0.0, 1.0),
            ("max_perplexity_ratio", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not lowest < value <= highest:
                limit = "" if math.isinf(highest) else f", at most {highest:g}"
                raise ConfigError(
                    f"evaluation.{name}",
                    value=value,
                    rule=f"must be greater than {lowest:g}{limit}",
                    remedy="change it, or leave the gate out",
                )
        if self.has_gates and not self.num_sequences:
            raise ConfigError(
                "evaluation.num_sequences",
                value=0,
                rule="max_kl, min_top1 and max_perplexity_ratio need something to measure",
                remedy="raise it, or leave the gates out",
            )

    @property
    def has_gates(self) -> bool:
        """Whether the checkpoint must reach anything."""
        gates = (self.max_kl, self.min_top1, self.max_perplexity_ratio)
        return any(gate is not None for gate in gates)


@dataclass(kw_only=True)
class SnapshotConfig:
    """When the hidden states between two layers are kept for a restart."""

    layers: int | None = None
    minutes: float | None = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        """Checks each number on its own."""
        for name in ("layers", "minutes", "keep"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"snapshots.{name}",
                    value=value,
                    rule="must be positive and finite",
                    remedy="change it" if name == "keep" else "null takes none by this measure",
                )


def _too_many(name: str, value: int) -> ConfigError:
    return ConfigError(
        name,
        value=value,
        rule=f"must be at most {MOST_SEQUENCES}",
        remedy="lower it; 512 sequences calibrate, 8 to 64 evaluate",
    )
