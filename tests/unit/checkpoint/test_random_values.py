"""Random values: nearly normal with outliers, fixed for ever, from torch as from the kernel."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.checkpoint.random_values import (
    LARGE_COLUMN_ONE_IN,
    SPREAD,
    TAIL_ONE_IN,
    Window,
    fill_normal,
    key_of,
    random_bits,
    sum_of_bytes,
)

KEY = key_of(0, "weight")


def matrix(rows: int, columns: int, name: str = "weight", *, seed: int = 0) -> torch.Tensor:
    """FP32 [rows, columns] of standard deviation 1."""
    target = torch.full((1, rows, columns), torch.nan)
    window = Window(columns)
    fill_normal(target, [key_of(seed, name)], window, standard_deviation=1.0, is_bf16=False)
    return target[0]


def test_the_values_never_change() -> None:
    assert KEY == (3452622921, 2574948139)
    first, second = random_bits(torch.tensor([0, 1, 2**32 + 1]), KEY)
    assert first.tolist() == [3854795133, 3866879014, 2252896701]
    assert second.tolist() == [1088278182, 3905935687, 3969443448]
    assert matrix(2, 2).bfloat16().flatten().tolist() == [1.34375, 1.390625, -0.3125, -0.77734375]


def test_the_sum_is_nearly_normal_and_centred() -> None:
    sums = sum_of_bytes(*random_bits(torch.arange(1 << 20), KEY)).double() / SPREAD
    assert sums.mean().item() == pytest.approx(0.0, abs=4e-3)
    assert sums.std().item() == pytest.approx(1.0, rel=3e-3)
    assert (sums**4).mean().item() == pytest.approx(3 - 1.2 / 8, rel=1e-2)
    for lag in (1, 2, 16, 4096):
        assert (sums[lag:] * sums[:-lag]).mean().item() == pytest.approx(0.0, abs=5e-3)


def test_every_bit_is_fair() -> None:
    for bits in random_bits(torch.arange(1 << 18), KEY):
        for shift in range(32):
            assert ((bits >> shift) & 1).double().mean().item() == pytest.approx(0.5, abs=5e-3)


def test_some_columns_and_some_elements_are_larger() -> None:
    values = matrix(1024, 4096)
    assert values.std().item() == pytest.approx(1.0, rel=0.03)
    by_column = values.std(dim=0)
    large = by_column > 2 * by_column.median()
    assert 0.4 < large.sum().item() * LARGE_COLUMN_ONE_IN / 4096 < 1.6
    assert (by_column[large].mean() / by_column[~large].mean()).item() == pytest.approx(4, rel=0.05)
    normal = values[:, ~large] / by_column.median()
    share = (normal.abs() > 5).double().mean().item()  # 8 * |z| > 5: 53 % of the tail
    assert share * TAIL_ONE_IN == pytest.approx(0.53, rel=0.15)


def test_names_and_seeds_give_unrelated_values() -> None:
    values = matrix(512, 512)
    for other in (matrix(512, 512, "weights"), matrix(512, 512, seed=1)):
        assert torch.corrcoef(torch.stack([values.flatten(), other.flatten()]))[0, 1].abs() < 0.01


def test_a_part_is_what_the_whole_holds_there() -> None:
    whole = matrix(300, 200)
    part = torch.empty(1, 150, 70)
    window = Window(200, first_row=100, first_column=30)
    fill_normal(part, [KEY], window, standard_deviation=1.0, is_bf16=False)
    assert torch.equal(part[0], whole[100:250, 30:100])


def test_offsets_beyond_32_bits_are_told_apart() -> None:
    columns = 1024
    parts = []
    for first_row in (0, 2**32 // columns):
        part = torch.empty(1, 4, columns)
        window = Window(columns, first_row=first_row)
        fill_normal(part, [KEY], window, standard_deviation=1.0, is_bf16=False)
        parts.append(part)
    assert not torch.equal(*parts)


def test_bf16_values_are_rounded_once_whatever_holds_them() -> None:
    narrow, wide = torch.empty(1, 64, 64, dtype=torch.bfloat16), torch.empty(1, 64, 64)
    for target in (narrow, wide):
        fill_normal(target, [KEY], Window(64), standard_deviation=1.0, is_bf16=True)
    assert torch.equal(narrow.float(), wide)
    assert torch.equal(narrow[0], matrix(64, 64).bfloat16())


def test_nothing_to_fill() -> None:
    fill_normal(torch.empty(1, 0, 8), [KEY], Window(8), standard_deviation=1.0, is_bf16=True)


INTERPRETED = """
import torch
from pipeline.checkpoint import random_values as ours

keys = [ours.key_of(3, name) for name in "ab"]
windows = [
    (ours.Window(700, first_row=3, first_column=9), (2, 21, 600)),
    (ours.Window(4), (2, 37, 4)),
    (ours.Window(1), (2, 1, 1)),
    (ours.Window(700, first_row=2**33 // 700), (2, 9, 700)),
]
scale = torch.tensor(0.1 / (ours.SPREAD * ours._GROWTH)).item()
for window, shape in windows:
    for dtype in (torch.bfloat16, torch.float32):
        for is_bf16 in (True, False):
            expected = torch.zeros(*shape[:2], 2 * shape[2], dtype=dtype)[..., : shape[2]]
            made = torch.zeros_like(expected)
            ours.fill_normal(expected, keys, window, standard_deviation=0.1, is_bf16=is_bf16)
            ours.launch_fill_normal(made, keys, window, scale=scale, is_bf16=is_bf16)
            assert expected.count_nonzero() > 0.9 * expected.numel()
            assert torch.equal(expected, made), (window, dtype, is_bf16)
"""


def test_the_kernel_says_the_same_as_torch() -> None:
    """In Triton's interpreter, which must be chosen before triton is imported."""
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
