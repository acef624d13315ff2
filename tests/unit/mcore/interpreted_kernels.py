"""The layers' Triton kernels on a CPU: run as a program, with TRITON_INTERPRET=1.

In fp32, since Triton's interpreter cuts bf16 off where a GPU rounds.
"""

import math

import torch
import torch.nn.functional as F

from pipeline.mcore.kernels import activation, convolution, norm, scan
from pipeline.mcore.norms import normalize
from pipeline.mcore.ssd import scan_in_torch
from tests.unit.mcore.interpreted_moe_kernels import check_moe_kernels


def _check_activation() -> None:
    x, amax = torch.randn(9001), torch.zeros(1)
    expected = x.relu().square()
    assert torch.equal(activation._square_on_gpu(x, amax), expected)
    assert amax == expected.max()
    x[77] = -torch.nan
    activation._raise_on_gpu(x, amax)
    assert amax == math.inf


def _check_norms() -> None:
    x, weight, amax = torch.randn(5, 2, 77), torch.randn(77), torch.zeros(1)
    out = norm.rms_norm(x, weight, 1e-5, amax)
    torch.testing.assert_close(out, normalize(x, 1e-5) * weight)
    assert amax == out.abs().max()

    z_bld = torch.randn(9, 3, 60)[..., :48].transpose(0, 1)
    x_bld, weight = torch.randn(3, 9, 48), torch.randn(48)
    out_bld = torch.empty(9, 3, 48).transpose(0, 1)
    norm.gated_rms_norm(x_bld, z_bld, weight, 1e-5, 12, out_bld=out_bld, amax=amax.zero_())
    groups = (x_bld * F.silu(z_bld)).unflatten(-1, (-1, 12))
    torch.testing.assert_close(out_bld, normalize(groups, 1e-5).flatten(-2) * weight)
    assert amax == out_bld.abs().max()


def _check_convolution() -> None:
    for width in (2, 4):
        x_bld = torch.randn(40, 2, 200)[..., 16:166].transpose(0, 1)
        arguments = (x_bld, torch.randn(150, width), torch.randn(150))
        ours = convolution._convolve_on_gpu(*arguments)
        torch.testing.assert_close(ours, convolution._convolve_in_torch(*arguments))


def _check_scan() -> None:
    for batch, length, heads, groups, head_dim, state in (
        (2, 150, 4, 2, 8, 16),
        (1, 37, 6, 3, 20, 24),
    ):
        widths = (heads * head_dim, groups * state, groups * state)
        x, B, C = torch.randn(batch, length, sum(widths)).split(widths, dim=-1)
        arguments = (
            x.unflatten(-1, (heads, head_dim)),
            torch.randn(batch, length, heads) - 2.0,
            -8.0 * torch.rand(heads),
            B.unflatten(-1, (groups, state)),
            C.unflatten(-1, (groups, state)),
            torch.randn(heads),
            torch.randn(heads),
        )
        torch.testing.assert_close(
            scan.scan(*arguments), scan_in_torch(*arguments, 32), rtol=1e-4, atol=1e-4
        )


if __name__ == "__main__":
    torch.manual_seed(3)
    _check_activation()
    _check_norms()
    _check_convolution()
    _check_scan()
    check_moe_kernels()
