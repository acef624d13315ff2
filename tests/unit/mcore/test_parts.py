"""The pieces under the slots, each against a plain formulation."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.mcore.kernels.activation import raise_amax, relu_squared_
from pipeline.mcore.kernels.convolution import convolve
from pipeline.mcore.norms import GatedRMSNorm, RMSNorm
from pipeline.mcore.router import keep_best_groups
from pipeline.mcore.ssd import scan_in_torch

CPU = torch.device("cpu")


def _recurrence(x, dt, A, B, C):  # type: ignore[no-untyped-def]
    """The definition, position by position, in fp64."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    repeats = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeats, 2), C.repeat_interleave(repeats, 2)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        added = torch.einsum("bhp,bhn->bhpn", x[:, t] * dt[:, t, :, None], B[:, t])
        state = state * (dt[:, t] * A).exp()[..., None, None] + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 16, 29, 64])
def test_scan_is_the_recurrence_whatever_the_chunk_size(chunk_size: int) -> None:
    torch.manual_seed(3)
    x, dt = torch.randn(2, 29, 6, 4), torch.randn(2, 29, 6)
    B, C = torch.randn(2, 29, 3, 5), torch.randn(2, 29, 3, 5)
    A, D, dt_bias = -torch.rand(6) * 8, torch.randn(6), torch.randn(6)
    y = scan_in_torch(x, dt, A, B, C, D, dt_bias, chunk_size)
    expected = _recurrence(x, F.softplus(dt + dt_bias), A, B, C) + x.double() * D[:, None]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_scan_keeps_the_dtype_and_computes_in_fp32() -> None:
    torch.manual_seed(3)
    x, B, C = (torch.randn(1, 9, 2, 4).bfloat16() for _ in range(3))
    dt, A, zeros = torch.randn(1, 9, 2).bfloat16(), -torch.rand(2), torch.zeros(2)
    y = scan_in_torch(x, dt, A, B, C, zeros, zeros, 4)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, _recurrence(x, F.softplus(dt.float()), A, B, C).to(torch.bfloat16))


def test_norms() -> None:
    torch.manual_seed(3)
    x, z = torch.randn(3, 2, 12) * 5, torch.randn(3, 2, 12)
    amax, gated_amax = torch.zeros(1), torch.zeros(1)
    norm = RMSNorm(12, 1e-3, device=CPU, dtype=torch.float32)
    norm.weight.data.normal_()
    torch.testing.assert_close(norm(x, amax), F.rms_norm(x, (12,), norm.weight, 1e-3))
    assert amax == norm(x).abs().amax()
    gated = GatedRMSNorm(12, 1e-3, group_size=4, device=CPU, dtype=torch.float32)
    gated.weight.data.normal_()
    parts = (x * F.silu(z)).split(4, dim=-1)
    expected = torch.cat([F.rms_norm(part, (4,), eps=1e-3) for part in parts], -1) * gated.weight
    torch.testing.assert_close(gated(x, z, amax=gated_amax), expected)
    assert gated_amax == gated(x, z).abs().amax()
    assert norm(x.bfloat16()).dtype is gated(x.bfloat16(), z).dtype is torch.bfloat16


def test_groups_are_chosen_by_their_two_best() -> None:
    choice = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.0, 0.4, 0.4, 0.4]])
    kept = keep_best_groups(choice, groups=3, kept=2)  # 0.9, 1.0 and 0.8
    assert kept.isneginf().tolist() == [[False] * 6 + [True] * 3]
    assert torch.equal(kept[:, :6], choice[:, :6])


def test_convolution_is_causal_and_depthwise() -> None:
    torch.manual_seed(3)
    x_bld, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 1, 4), torch.randn(6)
    expected = F.silu(F.conv1d(x_bld.transpose(1, 2), weight, bias, padding=3, groups=6)[..., :9])
    convolved = convolve(x_bld, weight.squeeze(1), bias)
    torch.testing.assert_close(convolved, expected.transpose(1, 2))
    assert convolve(x_bld.bfloat16(), weight.squeeze(1), bias).dtype is torch.bfloat16


def test_squares_and_their_amax() -> None:
    x, amax = torch.tensor([[-3.0, 2.0], [0.5, -0.0]]), torch.tensor([1.0])
    assert relu_squared_(x, amax) is x
    assert x.tolist() == [[0.0, 4.0], [0.25, 0.0]]
    assert amax.item() == 4.0
    raise_amax(torch.tensor([-9.0, 1.0]), amax)
    raise_amax(torch.empty(0), amax)
    assert amax.item() == 9.0
    raise_amax(torch.tensor([1.0, torch.nan]), amax)
    assert amax.item() == torch.inf
