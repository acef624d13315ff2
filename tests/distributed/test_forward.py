"""Every layout of four ranks against transformers: logits, counts, taps, shards, same bits."""

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.architecture import LayerType, layer_tensors
from pipeline.mcore import backend
from pipeline.sharding import ParallelDims, shard_of
from tests.distributed.helpers import run_ranks
from tests.unit.mcore.models import (
    BATCH,
    SEQ_LEN,
    RecordingTap,
    Reference,
    expected_logits,
    logits_of,
    make_reference,
    make_slots,
    reader,
    run_layers,
)

WORLD = 4
LAYOUTS = [
    {"tp": 1, "ep": 1, "etp": 1},
    {"tp": 2, "ep": 1, "etp": 1},
    {"tp": 4, "ep": 1, "etp": 1},  # two key/value heads: shared by two ranks each
    {"tp": 1, "ep": 2, "etp": 1},
    {"tp": 1, "ep": 4, "etp": 1},
    {"tp": 2, "ep": 2, "etp": 1},
    {"tp": 2, "ep": 4, "etp": 1},
    {"tp": 4, "ep": 4, "etp": 1},
    {"tp": 1, "ep": 1, "etp": 2},
    {"tp": 1, "ep": 2, "etp": 2},
    {"tp": 2, "ep": 1, "etp": 2},
    {"tp": 2, "ep": 2, "etp": 2},
    {"tp": 4, "ep": 1, "etp": 4},
]


@dataclasses.dataclass
class Outcome:
    """What one rank saw under one layout."""

    difference: float
    repeats: bool
    tokens: int
    tokens_per_expert: list[int]
    amax: dict[str, float]


def _run_layouts(
    rank: int, references: dict[str, Reference], layouts: list[dict[str, int]], world: int
) -> dict[tuple[str, str], Outcome]:
    outcomes = {}
    for degrees in layouts:
        dims = ParallelDims(world=world, **degrees)
        groups = backend.start(dims, rank, torch.device("cpu"))
        for name, reference in references.items():
            outcomes[name, dims.describe()] = _run_one(reference, groups)
    return outcomes


def _run_one(reference: Reference, groups: backend.Groups) -> Outcome:
    # Two sequences, or as many as there are data-parallel ranks: copies of the two.
    if groups.dims.dp > BATCH:
        copies = groups.dims.dp // BATCH
        reference = dataclasses.replace(
            reference,
            ids=reference.ids.repeat(copies, 1),
            logits=reference.logits.repeat(copies, 1, 1),
        )
    slots = make_slots(reference, groups)
    tap = RecordingTap(reference.architecture.n_routed_experts)
    hidden = run_layers(reference, groups, slots, tap)
    again = run_layers(reference, groups, slots)
    difference = logits_of(reference, hidden) - expected_logits(reference, groups)
    _check_weights(reference, groups, slots)
    return Outcome(
        difference.abs().max().item(),
        torch.equal(hidden, again),
        tap.tokens,
        tap.tokens_per_expert.tolist(),
        tap.amax,
    )


def _check_weights(reference: Reference, groups: backend.Groups, slots: Any) -> None:
    """`weight` and `experts` give exactly the shards that were read, for the last layer held."""
    read = reader(reference.tensors)
    for slot in slots.values():
        stacks = {}
        if slot.layer_type is LayerType.moe:
            stacks = {name: slot.experts(name) for name in ("up_proj", "down_proj")}
        for spec in layer_tensors(reference.architecture, slot.layer):
            shard = shard_of(spec, reference.architecture, groups.dims, groups.rank)
            if shard is None or not spec.is_linear_weight:
                continue
            if spec.is_routed_expert:
                stack, first = stacks[spec.module.rpartition(".")[2]]
                held = stack[spec.expert - first]
            else:
                held = slot.weight(spec.name)
            assert torch.equal(held, read(spec, shard)), spec.name


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {name: make_reference(name) for name in ("all_kinds", "wide")}


@pytest.fixture(scope="module")
def outcomes(references: dict[str, Reference]) -> list[dict[tuple[str, str], Outcome]]:
    return run_ranks(_run_layouts, WORLD, references, LAYOUTS, WORLD, timeout=300)


def _layouts() -> list[str]:
    return [ParallelDims(world=WORLD, **degrees).describe() for degrees in LAYOUTS]


@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("variant", ["all_kinds", "wide"])
def test_layout(
    outcomes: list[dict[tuple[str, str], Outcome]],
    references: dict[str, Reference],
    variant: str,
    layout: str,
) -> None:
    ranks = [rank[variant, layout] for rank in outcomes]
    assert max(rank.difference for rank in ranks) < 1e-4
    assert all(rank.repeats for rank in ranks), "another result in the second run"

    architecture = references[variant].architecture
    moe_layers = len(architecture.layers_of(LayerType.moe))
    dp = WORLD // int(layout.split("tp=")[1].split()[0])
    tokens = max(dp, BATCH) * SEQ_LEN * moe_layers
    assert sum(rank.tokens for rank in ranks) == tokens
    routed = torch.tensor([rank.tokens_per_expert for rank in ranks]).sum(dim=0)
    assert routed.sum() == tokens * architecture.num_experts_per_tok


@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("variant", ["all_kinds", "wide"])
def test_amax_is_that_of_transformers(
    outcomes: list[dict[tuple[str, str], Outcome]],
    references: dict[str, Reference],
    variant: str,
    layout: str,
) -> None:
    ranks = [rank[variant, layout].amax for rank in outcomes]
    amax = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    assert amax == pytest.approx(references[variant].amax, rel=1e-4)
