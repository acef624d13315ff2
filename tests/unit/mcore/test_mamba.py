"""A Mamba layer that scans in several parts."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.architecture import LayerType
from pipeline.mcore import backend
from pipeline.sharding import ParallelDims
from tests.unit.mcore.models import SEQ_LEN, RecordingTap, make_reference, make_slots, reader


@pytest.fixture
def groups() -> Iterator[backend.Groups]:
    yield backend.start(ParallelDims(), 0, torch.device("cpu"))
    backend.stop()


def test_parts_of_a_batch_give_the_same_bits(
    groups: backend.Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_reference("mamba")
    slot = make_slots(reference, groups)[LayerType.mamba]
    slot.fill(0, reader(reference.tensors))
    hidden = torch.randn(SEQ_LEN, 5, 64)
    results = []
    for elements in (2**27, 2 * SEQ_LEN * 64, 1):  # all five sequences; 2, 2 and 1; one by one
        monkeypatch.setattr("pipeline.mcore.mamba._SCAN_ELEMENTS", elements)
        tap = RecordingTap(1)
        results.append((slot.forward(hidden.clone(), tap), tap.amax))
    for output, amax in results[1:]:
        assert torch.equal(output, results[0][0])
        assert amax == results[0][1]
