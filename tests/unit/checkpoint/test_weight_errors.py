"""What a format explains and what it does not, by tensor, row and block."""

import pytest
import torch

from pipeline.checkpoint.weight_errors import WeightErrors, compare_weights, read_errors
from pipeline.nvfp4.formats import WeightMethod
from pipeline.nvfp4.reference import (
    dequantize_nvfp4,
    quantize_fp8,
    quantize_nvfp4,
    tensor_amax,
)

NVFP4, FP8 = "NVFP4", "FP8"
METHODS = [*WeightMethod, None]


def weights(kind: str) -> torch.Tensor:
    """bf16 [96, 256] of different tails."""
    draw = torch.Generator().manual_seed(3)
    normal = torch.randn(96, 256, generator=draw)
    if kind == "heavy tails":
        normal /= torch.rand(96, 256, generator=draw).clamp(min=1e-4)
    if kind == "rows of all sizes":
        normal *= torch.exp(3 * torch.randn(96, 1, generator=draw))
    if kind == "rows of zeros":
        normal[::2] = 0.0
    return normal.bfloat16()


def stored(weight: torch.Tensor, method: WeightMethod | None) -> tuple[torch.Tensor, str, float]:
    """Values, format and scale of the tensor."""
    if method is None:
        codes, scale = quantize_fp8(weight, tensor_amax(weight))
        return codes.float() * scale, FP8, float(scale)
    packed = quantize_nvfp4(weight, tensor_amax(weight), method)
    return dequantize_nvfp4(packed), NVFP4, float(packed.weight_scale_2)


def errors(
    values: torch.Tensor, weight: torch.Tensor, algorithm: str, scale: float
) -> WeightErrors:
    return read_errors(compare_weights(values, weight, algorithm, scale).tolist(), weight.shape[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "rows of all sizes", "rows of zeros"])
def test_what_packing_does_is_explained(kind: str, method: WeightMethod | None) -> None:
    weight = weights(kind)
    values, algorithm, scale = stored(weight, method)
    assert errors(values, weight, algorithm, scale).fault(algorithm) == ""


def test_the_worst_block_of_max_is_explained() -> None:
    weight = torch.full((64, 256), 5.0).bfloat16()
    weight[:, ::16] = 6.0
    weight *= torch.where(torch.rand(64, 256) < 0.5, -1, 1)
    found = errors(*(stored(weight, WeightMethod.max)[0], weight), NVFP4, 6 / 2688)
    assert found.relative == pytest.approx(0.191, abs=1e-3)
    assert found.row.ratio < 1
    assert found.block.ratio < 1


@pytest.mark.parametrize("method", METHODS)
def test_places_of_faults(method: WeightMethod | None) -> None:
    weight = weights("gaussian")
    values, algorithm, scale = stored(weight, method)
    row, block = values.clone(), values.clone()
    row[41] *= 1.5
    block[17, 32:48] = 0.0
    assert errors(row, weight, algorithm, scale).fault(algorithm).startswith("row 41 is ")
    found = errors(block, weight, algorithm, scale)
    assert (found.block.row, found.block.column, found.block.width) == (17, 32, 16)
    if algorithm == NVFP4:
        assert found.fault(algorithm).startswith("row 17, columns 32 to 47 is ")
    block[3, 200] = float("nan")
    assert "nan away from the source" in errors(block, weight, algorithm, scale).fault(algorithm)


def test_a_clipped_outlier_of_fp8_is_explained_and_a_rescaled_row_is_not() -> None:
    weight = weights("gaussian")
    weight[5, 9] = 1.25 * tensor_amax(weight)
    codes, scale = quantize_fp8(weight, tensor_amax(weight) * 0.8)
    values = codes.float() * scale
    assert errors(values, weight, FP8, float(scale)).fault(FP8) == ""
    values[6] *= 0.8
    assert errors(values, weight, FP8, float(scale)).fault(FP8).startswith("row 6 is ")


def test_pieces_and_odd_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("gaussian")[:, :250]
    values, algorithm, scale = stored(weight, None)
    values[90] = 0.0
    whole = compare_weights(values, weight, algorithm, scale)
    monkeypatch.setattr("pipeline.checkpoint.weight_errors._PIECE", 250 * 7)
    torch.testing.assert_close(compare_weights(values, weight, algorithm, scale), whole)
    assert errors(values, weight, algorithm, scale).block.describe() == "row 90, columns 0 to 249"
    assert compare_weights(values[:0], weight[:0], algorithm, scale).tolist() == [0.0] * 14
