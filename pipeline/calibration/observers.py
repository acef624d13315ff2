"""Observers: measure activations as they pass, and leave them as they are.

In: the inputs of projections, keys and values, and routing maps, handed over by a slot's taps
during the forward pass. Out: one statistic each, which says by which operation the ranks combine
it and what it is when nothing was seen (`pipeline.calibration.reduce` does the collectives).
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum

import torch


class Reduction(StrEnum):
    """How ranks combine a statistic."""

    max = "max"
    sum = "sum"


@dataclasses.dataclass
class Statistic:
    """A vector that the ranks combine element by element.

    Attributes:
        name: Of the observer.
        reduction: Operation; its identity (0 for both) stands where nothing was seen.
        values: fp32 for max, fp64 for sum; shape [n].
    """

    name: str
    reduction: Reduction
    values: torch.Tensor


class AmaxObserver:
    """Largest absolute value of everything seen at one tap; 0 when nothing was seen."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.statistic = Statistic(name, Reduction.max, torch.zeros(1, device=device))

    def observe(self, x: torch.Tensor) -> None:
        """Takes in a tensor of any shape; NaN counts as inf, so that it cannot get lost."""
        if x.numel():
            amax = torch.linalg.vector_norm(x, torch.inf).float()
            amax = torch.nan_to_num(amax, nan=torch.inf, posinf=torch.inf)
            torch.maximum(self.statistic.values, amax, out=self.statistic.values)


class TokenCountObserver:
    """Tokens per expert, over distinct tokens only: padding has weight 0.

    Weights are 0 or 1, so the sums are exact in any order.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        values = torch.zeros(experts, dtype=torch.float64, device=device)
        self.statistic = Statistic("tokens_per_expert", Reduction.sum, values)

    def observe(self, chosen_TK: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes in the experts of each token, int [tokens, top_k], and their weights, [tokens]."""
        added_TK = weights.double().unsqueeze(1).expand(chosen_TK.shape)
        self.statistic.values.scatter_add_(0, chosen_TK.flatten().long(), added_TK.flatten())


class LayerObserver:
    """The tap of one layer: routes what passes to the observers that the recipe needs.

    Args:
        observed: Taps whose amax is needed (`LayerSchedule.observed`).
        experts: Number of routed experts, 0 in layers without.
        device: Where the statistics live.
    """

    def __init__(self, observed: tuple[str, ...], experts: int, device: torch.device) -> None:
        self._amax = {name: AmaxObserver(name, device) for name in observed}
        self._tokens = TokenCountObserver(experts, device) if experts else None
        self._token_weights = torch.empty(0, device=device)

    def begin_batch(self, sequence_weights: torch.Tensor, positions: int) -> None:
        """Sets the weights of a micro-batch: [batch], each sequence has `positions` tokens here."""
        self._token_weights = sequence_weights.repeat(positions)

    def activation(self, projection: str, x: torch.Tensor) -> None:
        """Input of a projection (or `k_cache`, `v_cache`)."""
        observer = self._amax.get(projection)
        if observer is not None:
            observer.observe(x)

    def amax_of(self, projection: str) -> torch.Tensor | None:
        """The running amax, fp32 [1], of a projection's inputs, for a kernel to raise."""
        observer = self._amax.get(projection)
        return None if observer is None else observer.statistic.values

    def routing(self, chosen_TK: torch.Tensor) -> None:
        """Experts chosen by this rank's own tokens, int [positions * batch, top_k]."""
        if self._tokens is not None:
            self._tokens.observe(chosen_TK, self._token_weights)

    def statistics(self) -> list[Statistic]:
        """All statistics of the layer, in the same order on every rank."""
        statistics = [observer.statistic for observer in self._amax.values()]
        if self._tokens is not None:
            statistics.append(self._tokens.statistic)
        return statistics
