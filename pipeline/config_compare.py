"""Options of `launch.compare`: those of a job, but several recipes and no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import DISCARD, CalibrateConfig, EvaluationConfig, PlanOutput
from pipeline.errors import ConfigError

COMPARISON_DIRECTORY = "layersweep-comparison"
"""Of the comparison, unless `report` says otherwise."""


@dataclass(kw_only=True)
class CompareConfig(CalibrateConfig):
    """Options of `launch.compare`; each is explained in conf/job/compare.yaml.

    Attributes:
        recipes: To be compared, all in one sweep.
        runs: Directories of finished runs to be compared instead.
        table: What goes to stdout.
    """

    checkpoint: str = ""
    output: str = DISCARD
    recipe: str = ""
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(group_sequences=0)
    )
    recipes: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    table: PlanOutput = PlanOutput.table

    def __post_init__(self) -> None:
        """Recipes for one sweep, or runs that are there already."""
        super().__post_init__()
        if bool(self.runs) == bool(self.recipes):
            raise ConfigError(
                "recipes, runs",
                value="both" if self.runs else "nothing",
                rule="exactly one of them says what to compare",
                remedy="recipes='[nvfp4_max,nvfp4_four_over_six]' checkpoint=DIR data=..., "
                "or runs='[OUTPUT_1,OUTPUT_2]' of finished runs",
            )
        if self.runs:
            return
        for name, is_wrong, rule, remedy in (
            ("recipe", bool(self.recipe), "a comparison takes several", "use recipes=[...]"),
            ("output", not self.discards_output, "a comparison writes no checkpoint", "leave it"),
            ("checkpoint", not self.checkpoint, "there is nothing to compare on", "name one"),
            (
                "evaluation.num_sequences",
                not self.evaluation.num_sequences,
                "recipes are compared by what they cost on evaluation text",
                "raise it",
            ),
            (
                "evaluation",
                self.evaluation.has_gates,
                "a comparison has no gates",
                "leave them out; they go with launch.calibrate and launch.evaluate",
            ),
            (
                "evaluation.group_sequences",
                self.evaluation.group_sequences > 0,
                "only launch.calibrate tells which group hurts",
                "leave it out",
            ),
            (
                "recipes",
                len(set(self.recipes)) < len(self.recipes),
                "every recipe stands there once",
                "leave the second out",
            ),
        ):
            if is_wrong:
                group, _, option = name.rpartition(".")
                value = getattr(getattr(self, group) if group else self, option)
                raise ConfigError(name, value=value, rule=rule, remedy=remedy)

    @property
    def report_directory(self) -> Path:
        """Where the comparison will lie."""
        return Path(self.report or COMPARISON_DIRECTORY)
