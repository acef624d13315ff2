# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""From tokens to router logits, and to each token's experts and their probabilities.

In: tokens and the router's weight. Out: logits as good as fp32 ones; the experts of each token, in
ascending order, and their probabilities in that order. Sums over a token's experts thus have one
order everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_SMALLEST_SUM = 1e-20  # transformers adds it before it divides by the sum of the chosen scores


# Tiles of the logits: one token block, some experts, and as many terms as are summed at a time.
_BLOCK_T, _BLOCK_E, _BLOCK_H = 128, 128, 64
_WARPS, _STAGES = 8, 3


def router_logits(tokens: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Logits fp32 [tokens, experts], as good as a product in fp32.

    On CUDA, tokens in bf16 meet an fp32 weight as three bf16 parts that add up to all of its 24
    bits (a bf16 weight is one part). Products of two bf16 numbers are exact in fp32. Hopper's
    tensor cores add them with truncation, which over 8192 terms would err ten times as much as a
    product in fp32; every 64 terms are therefore summed apart, and these sums with rounding.
    """
    is_aligned = weight_EH.shape[1] % 8 == 0  # the tensor memory accelerator moves 16 bytes
    if not (tokens.is_cuda and tokens.dtype is torch.bfloat16 and is_aligned):
        return F.linear(tokens.float(), weight_EH.float())
    return _multiply_on_gpu(tokens, split_in_bf16(weight_EH))


def _multiply_on_gpu(tokens: torch.Tensor, parts_PEH: torch.Tensor) -> torch.Tensor:
    assert tokens.is_contiguous()
    parts, experts, width = parts_PEH.shape
    logits_TE = torch.empty(tokens.shape[0], experts, dtype=torch.float32, device=tokens.device)
    grid = (triton.cdiv(experts, _BLOCK_E), triton.cdiv(tokens.shape[0], _BLOCK_T))
    _logits_kernel[grid](
        TensorDescriptor.from_tensor(tokens, [_BLOCK_T, _BLOCK_H]),
        TensorDescriptor.from_tensor(parts_PEH.view(parts * experts, width), [_BLOCK_E, _BLOCK_H]),
        logits_TE,
        tokens.shape[0],
        PARTS=parts,
        EXPERTS=experts,
        WIDTH=width,
        BLOCK_T=_BLOCK_T,
        BLOCK_E=_BLOCK_E,
        BLOCK_H=_BLOCK_H,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return logits_TE


def split_in_bf16(weight: torch.Tensor) -> torch.Tensor:
    """bf16 [parts, *shape], largest part first; their sum is the weight.

    An fp32 weight has three parts of 8 bits each. (What is below bf16's smallest number, 1e-40, is
    lost.)
    """
    if weight.dtype is torch.bfloat16:
        return weight.unsqueeze(0)
    rest, parts = weight.float(), []
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return torch.stack(parts)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest along the last dim; of equals, the lower index first.

    torch.topk leaves the order of equals open; a stable sort defines it on every device.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def weigh_experts(
    scores_TE: torch.Tensor, chosen_TK: torch.Tensor, *, normalizes: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts in ascending order, int32 [tokens, top_k], and their probabilities, fp32.

    Args:
        scores_TE: Sigmoid scores, fp32.
        chosen_TK: Experts of each token, in any order.
        normalizes: Whether each token's probabilities are divided by their sum.
        scaling: Factor of all probabilities.
    """
    chosen_TK = chosen_TK.sort(dim=-1).values
    probs_TK = scores_TE.gather(1, chosen_TK)
    if normalizes:
        probs_TK = probs_TK / (probs_TK.sum(dim=-1, keepdim=True) + _SMALLEST_SUM)
    return chosen_TK.to(torch.int32), probs_TK * scaling


def choose_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, *, normalizes: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses by sigmoid score plus bias and weighs by score alone.

    Args:
        logits_TE: Contiguous fp32 [tokens, experts].
        bias_E: Correction bias, fp32.
        top_k: Experts of each token. Of equals, the lower index is chosen; NaN is the largest.
        normalizes: Whether each token's probabilities are divided by their sum.
        scaling: Factor of all probabilities.

    Returns:
        Chosen experts in ascending order, int32 [tokens, top_k], and their probabilities, fp32.
    """
    assert top_k <= logits_TE.shape[1]
    if logits_TE.is_cuda:
        return _choose_on_gpu(logits_TE, bias_E, top_k, normalizes, scaling)
    scores_TE = torch.sigmoid(logits_TE)
    chosen_TK = largest(scores_TE + bias_E, top_k)
    return weigh_experts(scores_TE, chosen_TK, normalizes=normalizes, scaling=scaling)


def _choose_on_gpu(
    logits_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, normalizes: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert logits_TE.is_contiguous()
    tokens, experts = logits_TE.shape
    chosen_TK = torch.empty(tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    probs_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    _choose_kernel[(tokens,)](
        logits_TE,
        bias_E,
        chosen_TK,
        probs_TK,
        scaling,
        EXPERTS=experts,
        TOP_K=top_k,
        NORMALIZES=normalizes,
        SMALLEST_SUM=_SMALLEST_SUM,
        BLOCK=max(triton.next_power_of_2(experts), 32),
        num_warps=1,  # so that searching for the largest needs no shared memory
    )
    return chosen_TK, probs_TK


@triton.jit
def _logits_kernel(
    tokens_desc,
    parts_desc,
    logits_ptr,
    tokens,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    first_expert = tl.program_id(0) * BLOCK_E
    first_token = tl.program_id(1) * BLOCK_T
    total_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for step in range(tl.cdiv(WIDTH, BLOCK_H)):
        tokens_TH = tokens_desc.load([first_token, step * BLOCK_H])
        sum_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for part in tl.static_range(PARTS - 1, -1, -1):  # the smallest first
            part_EH = parts_desc.load([part * EXPERTS + first_expert, step * BLOCK_H])
            # The limit says nothing new (BLOCK_H terms are all there are), but without one Triton
            # would let a single part's product add to the total itself: with truncation.
            sum_TE = tl.dot(tokens_TH, part_EH.T, sum_TE, max_num_imprecise_acc=BLOCK_H)
        total_TE += sum_TE
    token = first_token + tl.arange(0, BLOCK_T)
    expert = first_expert + tl.arange(0, BLOCK_E)
    place_TE = token[:, None].to(tl.int64) * EXPERTS + expert[None, :]
    inside_TE = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    tl.store(logits_ptr + place_TE, total_TE, mask=inside_TE)


@triton.jit
def _choose_kernel(
    logits_ptr,
    bias_ptr,
    chosen_ptr,
    probs_ptr,
    scaling,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZES: tl.constexpr,
    SMALLEST_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    exists = expert < EXPERTS
    logits = tl.load(logits_ptr + token * EXPERTS + expert, mask=exists, other=0.0)
    scores = tl.div_rn(1.0, 1.0 + tl.exp(-logits))
    choice = scores + tl.load(bias_ptr + expert, mask=exists, other=0.0)

    # Integers that are ordered like the floats, -0.0 equal to 0.0, and NaN above all.
    bits = tl.where(choice == 0.0, 0.0, choice).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(choice == choice, order, 0x7FFFFFFF)
    taken: tl.constexpr = -0x80000000
    order = tl.where(exists, order, taken)
    for _ in range(TOP_K):
        best = tl.argmax(order, axis=0, tie_break_left=True)
        order = tl.where(expert == best, taken, order)

    is_chosen = (order == taken) & exists
    chosen_scores = tl.where(is_chosen, scores, 0.0)
    if NORMALIZES:
        scores = tl.div_rn(scores, tl.sum(chosen_scores, axis=0) + SMALLEST_SUM)
    place = token * TOP_K + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    tl.store(chosen_ptr + place, expert, mask=is_chosen)
    tl.store(probs_ptr + place, scores * scaling, mask=is_chosen)
