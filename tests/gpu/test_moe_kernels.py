"""The MoE layer's Triton kernels on a GPU against plain torch; the same bits twice."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from pipeline.mcore.dispatch import sort_by_expert
from pipeline.mcore.kernels.combine import combine, spread
from pipeline.mcore.kernels.grouped_mm import RowGroups, group_rows, grouped_mm
from pipeline.mcore.kernels.routing import choose_experts, router_logits

pytestmark = pytest.mark.gpu

# Rows per expert, outputs, inputs.
GROUPED = {
    "one_row": ([1], 8, 8),
    "experts_without_rows": ([0, 5, 130, 1, 0, 0, 300, 0], 40, 24),
    "partial_tiles": ([300, 0, 2], 264, 72),
    "all_on_one": ([0, 0, 0, 5000, 0, 0, 0, 0], 512, 256),
    "many_experts": ([(7 * i) % 13 for i in range(512)], 256, 128),
    "ultra": ([1000, 257, 0, 128], 5120, 2048),
}


@pytest.fixture(autouse=True)
def _on_gpu() -> Iterator[None]:
    torch.manual_seed(3)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


def _grouped(name: str) -> tuple[torch.Tensor, torch.Tensor, RowGroups, list[int]]:
    counts, width, depth = GROUPED[name]
    groups = group_rows(torch.tensor([0, *counts]).cumsum(0), sum(counts))
    rows = torch.randn(sum(counts), depth).bfloat16()
    weight_ENK = (torch.randn(len(counts), width, depth) / math.sqrt(depth)).bfloat16()
    return rows, weight_ENK, groups, counts


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_product_is_that_of_each_expert(name: str) -> None:
    rows, weight_ENK, groups, counts = _grouped(name)
    amax, again = torch.zeros(1), torch.zeros(1)
    product = grouped_mm(rows, weight_ENK, groups)
    exact = torch.cat(
        [
            part.double() @ weight_NK.double().T
            for part, weight_NK in zip(rows.split(counts), weight_ENK, strict=True)
        ]
    )
    torch.testing.assert_close(product.double(), exact, rtol=2**-8, atol=1e-5)
    squared = grouped_mm(rows, weight_ENK, groups, squares_relu=True, amax=amax)
    assert torch.equal(squared, F.relu(product).square())
    assert amax == squared.float().max()
    assert torch.equal(grouped_mm(rows, weight_ENK, groups), product)
    repeated = grouped_mm(rows, weight_ENK, groups, squares_relu=True, amax=again)
    assert torch.equal(repeated, squared)
    assert torch.equal(again, amax)


@pytest.mark.parametrize("name", ["partial_tiles", "all_on_one"])
def test_amax_keeps_what_was_there_and_turns_nan_into_inf(name: str) -> None:
    rows, weight_ENK, groups, _ = _grouped(name)
    amax = torch.full((1,), 1e9)
    grouped_mm(rows, weight_ENK, groups, squares_relu=True, amax=amax)
    assert amax == 1e9
    rows[-1, -1] = -math.nan
    squared = grouped_mm(rows, weight_ENK, groups, squares_relu=True, amax=amax)
    assert amax == math.inf
    assert squared[-1].isnan().all()
    assert squared[:-1].isfinite().all()


def test_widths_that_the_tensor_memory_accelerator_cannot_load() -> None:
    groups = group_rows(torch.tensor([0, 3, 5]), 5)
    rows, weight_ENK = torch.randn(5, 12).bfloat16(), torch.randn(2, 7, 12).bfloat16()
    expected = torch.cat((rows[:3] @ weight_ENK[0].T, rows[3:] @ weight_ENK[1].T))
    torch.testing.assert_close(grouped_mm(rows, weight_ENK, groups), expected)


@pytest.mark.parametrize(
    ("experts", "top_k"), [(1, 1), (8, 1), (8, 8), (40, 5), (128, 6), (512, 1), (512, 22)]
)
@pytest.mark.parametrize("normalizes", [True, False])
def test_choice_is_that_of_the_cpu(experts: int, top_k: int, normalizes: bool) -> None:
    # Logits and biases far enough apart that no rounding of the sigmoid decides.
    logits_TE = torch.randint(-40, 40, (999, experts)).float() / 8
    bias_E = torch.randint(-2, 3, (experts,)).float() / 4
    logits_TE[0] = 0.5
    logits_TE[1, experts // 2] = math.nan
    logits_TE[2, experts // 2] = -math.inf
    weighing = {"normalizes": normalizes, "scaling": 2.5}
    chosen_TK, probs_TK = choose_experts(logits_TE, bias_E, top_k, **weighing)
    expected_TK, expected = choose_experts(logits_TE.cpu(), bias_E.cpu(), top_k, **weighing)
    scores_TE = torch.sigmoid(logits_TE.cpu().double()) + bias_E.cpu()
    worst = scores_TE.gather(1, chosen_TK.cpu().long()).sum(1)
    best = scores_TE.gather(1, expected_TK.long()).sum(1)
    torch.testing.assert_close(worst, best, rtol=0.0, atol=1e-6, equal_nan=True)
    assert torch.equal(chosen_TK[:3].cpu(), expected_TK[:3])
    same = (chosen_TK.cpu() == expected_TK).all(1)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(
        probs_TK.cpu()[same], expected[same], rtol=2e-6, atol=1e-7, equal_nan=True
    )
    assert (chosen_TK.diff(dim=1) > 0).all()  # ascending, none twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "experts", "width"), [(1, 8, 64), (300, 40, 1032)])
def test_logits_are_as_good_as_fp32(
    tokens: int, experts: int, width: int, dtype: torch.dtype
) -> None:
    _check_logits(tokens, experts, width, dtype)


def test_logits_of_ultra_are_as_good_as_fp32() -> None:
    _check_logits(2048, 512, 8192, torch.float32)


def _check_logits(tokens: int, experts: int, width: int, dtype: torch.dtype) -> None:
    x, weight_EH = torch.randn(tokens, width).bfloat16(), torch.randn(experts, width).to(dtype)
    exact = x.double() @ weight_EH.double().T
    logits_TE = router_logits(x, weight_EH)
    in_fp32 = F.linear(x.float(), weight_EH.float())
    error = (logits_TE - exact).square().mean().sqrt()
    assert error < 1.2 * (in_fp32 - exact).square().mean().sqrt() + 1e-7 * exact.std()
    assert torch.equal(logits_TE, router_logits(x, weight_EH))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "first", "local", "width"),
    [
        (1, 8, 1, 0, 8, 32),
        (1, 8, 8, 4, 4, 32),
        (300, 512, 22, 0, 512, 2048),
        (300, 64, 6, 16, 16, 2056),
        (70, 8, 3, 0, 8, 5000),
    ],
)
def test_rows_and_sums_are_those_of_the_cpu(
    tokens: int, experts: int, top_k: int, first: int, local: int, width: int
) -> None:
    chosen_TK = torch.rand(tokens, experts).topk(top_k).indices.sort().values.int()
    x, probs_TK = torch.randn(tokens, width).bfloat16(), torch.rand(tokens, top_k)
    order = sort_by_expert(chosen_TK, first, local, holds_all=local == experts)
    on_cpu = sort_by_expert(chosen_TK.cpu(), first, local, holds_all=local == experts)
    assert torch.equal(order.position_TK.cpu(), on_cpu.position_TK)
    assert torch.equal(order.groups.offsets.cpu(), on_cpu.groups.offsets)
    rows = spread(x, order.position_TK, order.groups.rows)
    assert torch.equal(rows.cpu(), spread(x.cpu(), on_cpu.position_TK, on_cpu.groups.rows))
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        combined = combine(rows, order.position_TK, probs_TK, dtype)
        expected = combine(rows.cpu(), on_cpu.position_TK, probs_TK.cpu(), dtype)
        torch.testing.assert_close(combined.cpu(), expected, rtol=rtol, atol=1e-5)
        assert torch.equal(combined, combine(rows, order.position_TK, probs_TK, dtype))
