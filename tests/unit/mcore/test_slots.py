"""One rank's slots against transformers, layer kind by layer kind."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.mcore import backend
from pipeline.sharding import ParallelDims
from tests.unit.mcore.models import (
    VARIANTS,
    expected_logits,
    logits_of,
    make_reference,
    make_slots,
    run_layers,
)


@pytest.fixture(scope="module")
def groups() -> Iterator[backend.Groups]:
    yield backend.start(ParallelDims(), 0, torch.device("cpu"))
    backend.stop()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(groups: backend.Groups, variant: str) -> None:
    reference = make_reference(variant)
    hidden = run_layers(reference, groups, make_slots(reference, groups))
    difference = (logits_of(reference, hidden) - expected_logits(reference, groups)).abs().max()
    print(variant, difference.item(), reference.logits.abs().max().item())
    assert difference < 1e-4
