"""Ending early and well: whether a run was asked to stop after the layer in hand.

In: what any thread of any rank was asked for. Out: one answer for all ranks, at the end of a layer.
"""

from __future__ import annotations

from enum import Enum

import torch

from pipeline.runtime.collectives import Group, reduce_max


class Reason(Enum):
    """Who asked, in words; a later one outweighs those before."""

    nobody = ""
    file = "the file stop"
    sigusr1 = "SIGUSR1"
    launcher = "its launcher ended"
    sigterm = "SIGTERM"


_REASONS = list(Reason)


class Stop:
    """The wish to end after the layer in hand.

    Args:
        group: All ranks.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group
        self.reason = Reason.nobody
        self.layer: int | None = None

    def ask(self, reason: Reason) -> None:
        """Asks for it, from any thread of any rank."""
        if _REASONS.index(reason) > _REASONS.index(self.reason):
            self.reason = reason

    def agreed(self, layer: int) -> bool:
        """Whether any rank was asked; a collective of the CPU, after each layer.

        Args:
            layer: That every rank has just visited.
        """
        asked = torch.tensor([_REASONS.index(self.reason)])
        self.ask(_REASONS[int(reduce_max(asked, self.group))])
        self.layer = layer
        return self.reason is not Reason.nobody
