"""Every layout gives the same bytes."""

import struct
from pathlib import Path

import pytest

from tests.e2e.harness import is_activation_scalar, read_checkpoint, run_job

LAYOUTS = {
    "ep2": {"world": 2, "ep": 2},
    "tp2": {"world": 2, "tp": 2, "ep": 1},
    "dp2": {"world": 2, "ep": 1},
    "tp2-ep2": {"world": 2, "tp": 2, "ep": 2},
    "tp2-ep2-dp2": {"world": 4, "tp": 2, "ep": 2},
    "etp2": {"world": 2, "etp": 2, "ep": 1},
    "tp2-etp2-ep2": {"world": 4, "tp": 2, "etp": 2, "ep": 2},
    "ep4": {"world": 4, "ep": 4},
}
RECIPES = {
    "mix": "nvfp4_four_over_six",
    "all": "general/ptq/nvfp4_default-kv_fp8",
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("one")
    return {
        name: read_checkpoint(run_job(root / name, recipe=recipe))
        for name, recipe in RECIPES.items()
    }


CASES = [
    *((layout, "mix") for layout in LAYOUTS),
    *(
        pytest.param(layout, "all", marks=pytest.mark.slow)
        for layout in ("dp2", "ep4", "tp2-etp2-ep2")
    ),
]


@pytest.mark.parametrize(("layout", "recipe"), CASES)
def test_same_bytes_under_every_layout(
    layout: str, recipe: str, one_rank: dict[str, dict], tmp_path: Path
) -> None:
    ours = read_checkpoint(run_job(tmp_path / "out", recipe=RECIPES[recipe], **LAYOUTS[layout]))
    expected = one_rank[recipe]
    assert set(ours) == set(expected)
    for name, (dtype, shape, data) in ours.items():
        assert (dtype, shape) == expected[name][:2], name
        if is_activation_scalar(name):
            (a,), (b,) = struct.unpack("<f", data), struct.unpack("<f", expected[name][2])
            assert a == pytest.approx(b, rel=1e-3), name
        else:
            assert data == expected[name][2], name
