"""How far a quantized weight may be from its source: as a whole, in every row, in every block.

In: the values that stored codes and scales stand for, and the source's. Out: sums over the tensor,
its worst row and its worst block of 16, and in words what its format cannot explain. The audit and
the evaluation of a finished directory have these bounds in common.

Where the bounds come from. In NVFP4 the worst value lies halfway between two codes, 1/5 of itself
at 5 (codes 4 and 6) and at 2.5; a block scale that E4M3 rounds down by 1/16 clips the largest value
by as much. So no block errs by more than 0.2 under `max` (fifteen 5s beside one 6: 0.191), and the
other methods choose the scale that errs least. Rows and blocks are given more than that, for
methods that weigh errors; a tensor is not. Below 2**-6 block scales are 2**-9 apart: there values
are off by another half step, times 6. An FP8 value errs by at most 1/16 of itself, below its least
normal number by 2**-10; multipliers below 1 clip what is beyond 448 scales. Wrong rows, scales or
zeros give about 1. Gaussian weights measure 0.0952 (`max`), 0.0870 (`four_over_six`), 0.0813
(`mse`) and 0.0264 (FP8).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from pipeline.nvfp4.formats import BLOCK_SIZE, E4M3_MAX

_PIECE = 2**24
"""Weights compared at a time: temporaries in fp64 stay below 700 MB."""

_DEVIATIONS = 4
"""Standard deviations of a gain that are left to chance, roundings being independent."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Largest relative errors of a format.

    Attributes:
        whole: Of a tensor.
        gain: How far `<quantized, source> / <source, source>` may be from 1, beside what chance
            does where few values are most of a tensor. Rounding hardly moves it (by 0.009 and 0.002
            over the demo model's tensors), a wrong scale as much as it is wrong.
        row: Of a row.
        block: Of 16 values in a row.
        step: What every value of a row or block may be off beside that, in tensor scales.
        largest: Values beyond it, in tensor scales, are clipped.
    """

    whole: float
    gain: float
    row: float
    block: float
    step: float
    largest: float = math.inf


_NVFP4 = Bounds(whole=0.2, gain=0.04, row=0.3, block=0.5, step=3 * 2**-9)
BOUNDS: Mapping[str, Bounds] = {
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
    "FP8": Bounds(whole=0.06, gain=0.01, row=0.065, block=0.065, step=2**-10, largest=E4M3_MAX),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A row or a block of a tensor.

    Attributes:
        ratio: Its error over its bound.
        row: Its row.
        column: Its first column.
        width: Its columns; 0 for all.
        error: Norm of the difference to the source.
        bound: The largest that its format explains.
    """

    ratio: float = 0.0
    row: int = 0
    column: int = 0
    width: int = 0
    error: float = 0.0
    bound: float = 0.0

    def describe(self) -> str:
        """Where it is in its tensor."""
        if not self.width:
            return f"row {self.row}"
        return f"row {self.row}, columns {self.column} to {self.column + self.width - 1}"


@dataclasses.dataclass(frozen=True)
class WeightErrors:
    """How a quantized tensor, or a part of it, differs from its source.

    Attributes:
        squared_error: Sum of squared differences.
        squared_weight: Of the source's squares.
        product: Of quantized times source values.
        spread: Of squared differences times the source's squares.
        row: The worst row.
        block: The worst block.
    """

    squared_error: float = 0.0
    squared_weight: float = 0.0
    product: float = 0.0
    spread: float = 0.0
    row: Part = Part()
    block: Part = Part()

    def __add__(self, other: WeightErrors) -> WeightErrors:
        """Of both parts."""
        return WeightErrors(
            self.squared_error + other.squared_error,
            self.squared_weight + other.squared_weight,
            self.product + other.product,
            self.spread + other.spread,
            max(self.row, other.row, key=lambda part: part.ratio),
            max(self.block, other.block, key=lambda part: part.ratio),
        )

    def moved(self, rows: int) -> WeightErrors:
        """The same of a piece that begins so many rows further down."""
        return dataclasses.replace(
            self,
            row=dataclasses.replace(self.row, row=self.row.row + rows),
            block=dataclasses.replace(self.block, row=self.block.row + rows),
        )

    @property
    def relative(self) -> float:
        """Norm of the difference over norm of the source."""
        if self.squared_weight == 0.0:
            return 0.0 if self.squared_error == 0.0 else math.inf
        return math.sqrt(self.squared_error / self.squared_weight)

    def fault(self, algorithm: str) -> str:
        """What the format cannot explain, to be said of the weight; empty where nothing is."""
        bounds = BOUNDS[algorithm]
        if not self.relative <= bounds.whole:  # NaN is wrong too
            return (
                f"is {self.relative:.4g} away from the source's (relative); "
                f"{algorithm} explains at most {bounds.whole:g}"
            )
        gain, chance = 1.0, 0.0
        if self.squared_weight:
            gain = self.product / self.squared_weight
            chance = _DEVIATIONS * math.sqrt(self.spread) / self.squared_weight
        if abs(gain - 1) > bounds.gain + chance:
            return f"is {gain:.3f} times the source's: a scale is wrong"
        # What fills a row is told of the row, what stands in one place of it of the block.
        part = self.block if self.block.ratio > 1.1 * self.row.ratio else self.row
        if part.ratio > 1:
            return (
                f"{part.describe()} is {part.error:.4g} away from the source's (norm of the "
                f"difference); {algorithm} explains at most {part.bound:.4g}"
            )
        return ""


@torch.inference_mode()
def compare_weights(
    quantized: torch.Tensor, source: torch.Tensor, algorithm: str, scale: float
) -> torch.Tensor:
    """Compares matrices [N, K] where they lie; `read_errors` understands the result, fp64 [14].

    Args:
        quantized: What codes and scales stand for.
        source: What they were made from.
        algorithm: Model Optimizer's name of the format.
        scale: Of the whole tensor: `weight_scale_2` of NVFP4, `weight_scale` of FP8.
    """
    bounds, (rows, columns) = BOUNDS[algorithm], quantized.shape
    found = torch.zeros(14, dtype=torch.float64, device=quantized.device)
    width = _block_width(columns)
    step = max(1, _PIECE // max(1, columns))
    for first in range(0, rows if columns else 0, step):
        before = source[first : first + step].double()
        after = quantized[first : first + step].double()
        found[2] += (after * before).sum()
        beyond = None
        if math.isfinite(bounds.largest):
            beyond = before.abs().sub_(bounds.largest * scale).clamp_(min=0.0).square_()
        error, weight = after.sub_(before).square_(), before.square_()
        found[3] += (error * weight).sum()
        error, weight = _sum_blocks(error, width), _sum_blocks(weight, width)
        clipped = torch.zeros_like(weight) if beyond is None else _sum_blocks(beyond, width)
        found[0] += error.sum()
        found[1] += weight.sum()
        blocks = (error, weight, clipped)
        row_sums = tuple(part.sum(1, keepdim=True) for part in blocks)
        for held, relative, size, parts in (
            (found[4:9], bounds.row, columns, row_sums),
            (found[9:14], bounds.block, width, blocks),
        ):
            bound = relative * parts[1].sqrt() + parts[2].sqrt()
            bound += math.sqrt(size) * bounds.step * scale
            worst = _worst(parts[0].sqrt(), bound, first)
            held.copy_(torch.where(worst[0] > held[0], worst, held))
    return found


def read_errors(values: list[float], columns: int) -> WeightErrors:
    """What `compare_weights` found in a matrix of so many columns."""
    row, block = (
        Part(ratio, int(index), int(number) * width, width, error, bound)
        for (ratio, index, number, error, bound), width in (
            (values[4:9], 0),
            (values[9:14], _block_width(columns)),
        )
    )
    return WeightErrors(values[0], values[1], values[2], values[3], row, block)


def _block_width(columns: int) -> int:
    """FP8 has no blocks, but a stretch of zeros hides in a long row; there K may be anything."""
    return columns if columns % BLOCK_SIZE else BLOCK_SIZE


def _sum_blocks(values: torch.Tensor, width: int) -> torch.Tensor:
    """[N, K] to [N, K / width]."""
    return values.view(len(values), -1, width).sum(-1)


def _worst(error_NB: torch.Tensor, bound_NB: torch.Tensor, first: int) -> torch.Tensor:
    """Ratio, row, number in its row, error and bound of the worst part, fp64 [5]."""
    ratio = (error_NB / bound_NB.clamp(min=1e-300)).nan_to_num(nan=math.inf).flatten()
    at = ratio.argmax()
    number, row = at % error_NB.shape[1], at // error_NB.shape[1] + first
    values = (ratio[at], row, number, error_NB.flatten()[at], bound_NB.flatten()[at])
    return torch.stack([value.double() for value in values])
