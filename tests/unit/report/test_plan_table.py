"""The plan in 80 columns, plain in a pipe, with every refusal and note; and as JSON."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from pipeline.memory import MemoryPlan
from pipeline.plan import GroupPlan, Plan
from pipeline.plan_ranks import RankPlan
from pipeline.report.plan_table import print_json, print_plan

MEMORY = MemoryPlan(8, False, 21 * 10**9, 34 * 10**9, 12 * 10**9, 10**9, 7 * 10**9, 30 * 10**9)


def plan_with(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "recipe": "mine",
        "layout": "world=1 (tp=1 dp=1; etp=1 ep=1 edp=1)",
        "layers": {"mamba": 2, "attention": 1, "moe": 1, "mlp": 0},
        "parameters": 560_520_000_000,
        "bf16_bytes": 1_121_040_000_000,
        "quantized_bytes": 352_292_449_888,
        "effective_bits": 5.028,
        "needs_forward": True,
        "kv_cache": "fp8 (calibrated)",
        "files": 12,
        "groups": [
            GroupPlan(
                "routed_expert",
                "nvfp4",
                "four_over_six",
                "nvfp4",
                48,
                49_152,
                515_396_075_520,
                1_030_792_151_040,
                289_910_489_088,
            ),
            GroupPlan("norm", "bf16", "", "", 0, 1, 8_192, 16_384, 16_384),
            GroupPlan("bias", "bf16", "", "", 1, 3, 12, 24, 24),
        ],
        "per_rank": [RankPlan(0, 21.5, 0.25, 1121.0, 352.3)],
        "memory": MEMORY,
        "snapshot_bytes": 34_359_738_368,
        "unmatched_patterns": ["*vision*"],
        "notes": ["K is narrow"],
        "refusals": [],
    }
    return Plan(**values | changes)


def render(plan: Plan) -> str:
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=80, highlight=False))
    return stream.getvalue()


def test_sizes_first_then_everything_else() -> None:
    text = render(plan_with())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for expected in (
        "recipe mine",
        "layers 4: 2 mamba, 1 attention, 1 moe layout",
        "size 1,121 GB -> 352.3 GB, 5.03 bits per parameter",
        "shards about 12 files; KV cache fp8 (calibrated)",
        "routed expert nvfp4 4-over-6 nvfp4 48 49,152 515.4 B 1,031 GB 289.9 GB",
        "norm bf16 1 8.2 k 16.4 kB 16.4 kB",
        "bias bf16 1 3 12 24 B 24 B",
        "0 21.5 0.2500 1,121.0 352.3",
        "disk beside the checkpoint 34.4 GB for each snapshot of the hidden states",
        "note patterns of the recipe that match nothing in this model: '*vision*'",
        "note K is narrow",
    ):
        assert expected in words, expected
    assert "refused" not in text


def test_markup_in_names_is_printed_as_it_is() -> None:
    text = render(plan_with(refusals=["[bold]x[/bold]: found [1, 2]"], notes=["[red]y"]))
    assert "refused  [bold]x[/bold]: found [1, 2]" in text
    assert "note     [red]y" in text


@pytest.mark.parametrize(("ranks", "shown"), [(8, 8), (9, 8), (64, 8)])
def test_many_ranks_are_cut_short(ranks: int, shown: int) -> None:
    rows = [RankPlan(rank, 1.0, 1.0, 1.0, 1.0) for rank in range(ranks)]
    text = render(plan_with(per_rank=rows))
    assert text.count("1.0    ") >= shown
    assert ("..." in text) == (ranks > shown)


def test_a_refused_layout_has_no_rank_table() -> None:
    text = render(plan_with(per_rank=[], refusals=["parallel.ep: found 3"]))
    assert "read ahead" not in text
    assert "refused  parallel.ep: found 3" in text


def test_json_is_one_object() -> None:
    stream = io.StringIO()
    print_json(plan_with().to_json(), Console(file=stream, width=20))
    values = json.loads(stream.getvalue())
    assert values["bf16_gb"] == 1121.04
    assert values["groups"][0]["tensors"] == 49_152
    assert values["per_rank"][0]["slot_gb"] == 21.5
