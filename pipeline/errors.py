"""Errors that a user can cause.

Every message answers four questions: what is wrong, which value was found, which rule it breaks
and what to do about it. Entry points print the message alone (no traceback) and exit with 2.
"""


class LayersweepError(Exception):
    """Base of everything a user can cause.

    Args:
        what: The thing at fault, by its full name (tensor, option, file).
        value: The value that was found.
        rule: The rule that it breaks.
        remedy: What to do about it.
    """

    def __init__(
        self, what: str, *, value: object = None, rule: str = "", remedy: str = ""
    ) -> None:
        self.what, self.value, self.rule, self.remedy = what, value, rule, remedy
        found = "" if value is None else f": found {value}"
        text = f"{what}{found}"
        if rule:
            text += f"; {rule}"
        if remedy:
            text += f". To mend it: {remedy}"
        super().__init__(text)


class ConfigError(LayersweepError):
    """An option of the command line or of a configuration file."""


class ArchitectureError(LayersweepError):
    """The model's own config.json."""


class SourceError(LayersweepError):
    """The source checkpoint: a missing, extra, misshapen, truncated or corrupt tensor or file."""


class RecipeError(LayersweepError):
    """The recipe: an unknown name, or something it asks for that is not supported."""


class LayoutError(LayersweepError):
    """Degrees of parallelism that do not fit the model or the number of ranks."""


class DataError(LayersweepError):
    """Calibration data: unreadable, empty or too little."""


class NumericsError(LayersweepError):
    """NaN or Inf in weights or activations, or a scale that cannot be chosen."""


class OutputError(LayersweepError):
    """The output directory, or the journal beside it."""


class AuditError(LayersweepError):
    """A finished checkpoint directory that breaks a rule of the format."""


class ClusterError(LayersweepError):
    """The batch system, or what it needs on this machine."""


class JointError(LayersweepError):
    """Why all ranks together do not start; every rank raises it, and rank 0 says it for all."""


class StoppedError(Exception):
    """The run was asked to end early, and did; nothing is wrong.

    Args:
        layer: The last one that was done; None where there was none.
        reason: Who asked.
    """

    def __init__(self, layer: int | None, reason: str) -> None:
        self.layer, self.reason = layer, reason
        where = "before the first layer" if layer is None else f"after layer {layer}"
        super().__init__(f"stopped {where} ({reason})")
