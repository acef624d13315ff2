"""Quantized inputs on two ranks: what transformers gives with the same quantization."""

from typing import Any

import pytest
import torch

from pipeline.mcore import backend
from pipeline.sharding import ParallelDims
from tests.distributed.helpers import run_ranks
from tests.unit.mcore.models import (
    Reference,
    expected_logits,
    logits_of,
    make_reference,
    make_slots,
    run_layers,
)
from tests.unit.mcore.quantized_models import OurQuantizer, Scale, scales_from, served_reference

WORLD = 2
LAYOUTS: list[dict[str, int]] = [
    {"ep": 2},
    {"tp": 2},
    {"tp": 2, "ep": 2},
    {"tp": 2, "etp": 2},
    {},  # two data-parallel ranks
]
Served = dict[str, tuple[Reference, dict[str, Scale]]]


def _run_layouts(rank: int, models: Served) -> dict[tuple[str, int], float]:
    differences = {}
    for number, degrees in enumerate(LAYOUTS):
        dims = ParallelDims(world=WORLD, **degrees)
        groups = backend.start(dims, rank, torch.device("cpu"))
        for variant, (served, scales) in models.items():
            slots = make_slots(served, groups)
            hidden = run_layers(served, groups, slots, None, OurQuantizer(scales))
            difference = logits_of(served, hidden) - expected_logits(served, groups)
            differences[variant, number] = difference.abs().max().item()
    return differences


@pytest.fixture(scope="module")
def differences() -> list[dict[tuple[str, int], float]]:
    models: Served = {}
    for variant in ("all_kinds", "moe"):
        scales = scales_from(make_reference(variant).amax)
        models[variant] = (served_reference(variant, scales), scales)
    values: list[Any] = run_ranks(_run_layouts, WORLD, models, timeout=120)
    return values


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
@pytest.mark.parametrize("variant", ["all_kinds", "moe"])
def test_layout(differences: list[dict[tuple[str, int], float]], variant: str, number: int) -> None:
    assert max(rank[variant, number] for rank in differences) < 1e-3
