"""Mamba-2's state space scan (SSD) in plain torch: for CPUs, and for fp32 anywhere.

In: per-token inputs, decays and state projections. Out: the scan's outputs. The sequence is cut
into chunks; inside a chunk the recurrence is a masked matrix product, and only the states at the
chunk borders are carried on one by one (Dao and Gu 2024, "Transformers are SSMs", listing 1).
All arithmetic is fp32, and the result does not depend on the chunk size beyond rounding.

Dims: b batch, l sequence, c chunk, q position in a chunk, h head, g group, r head in its group,
p head dim, n state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scan_in_torch(
    x_blhp: torch.Tensor,
    dt_blh: torch.Tensor,
    rate_h: torch.Tensor,
    B_blgn: torch.Tensor,
    C_blgn: torch.Tensor,
    D_h: torch.Tensor,
    dt_bias_h: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """The meaning of `pipeline.mcore.kernels.scan.scan`, in any dtype and on any device.

    Args:
        x_blhp: Inputs.
        dt_blh: Time steps, before bias and softplus.
        rate_h: Negative decay rates.
        B_blgn: Input projections.
        C_blgn: Output projections.
        D_h: Skip weights.
        dt_bias_h: Bias of the time steps.
        chunk_size: Positions per chunk.

    Returns:
        Outputs [b, l, h, p] in the dtype of `x_blhp`.
    """
    dt_blh = F.softplus(dt_blh.float() + dt_bias_h.float())
    y_blhp = scan_chunks(
        x_blhp.float(), dt_blh, rate_h.float(), B_blgn.float(), C_blgn.float(), chunk_size
    )
    return (y_blhp + x_blhp.float() * D_h.float().unsqueeze(-1)).to(x_blhp.dtype)


def scan_chunks(
    x_blhp: torch.Tensor,
    dt_blh: torch.Tensor,
    rate_h: torch.Tensor,
    B_blgn: torch.Tensor,
    C_blgn: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Outputs [b, l, h, p] of `state = exp(dt A) state + dt B x; y = C state`, all fp32."""
    length, heads = x_blhp.shape[1:3]
    groups = B_blgn.shape[2]
    chunk = min(chunk_size, length)
    padding = -length % chunk  # dt = 0: a padded position neither decays nor feeds the state

    def chunks(tensor: torch.Tensor) -> torch.Tensor:
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
        cut: torch.Tensor = padded.unflatten(1, (-1, chunk))
        return cut

    B_bcqgn, C_bcqgn = chunks(B_blgn), chunks(C_blgn)
    x_bcqgrp = chunks(x_blhp * dt_blh.unsqueeze(-1)).unflatten(3, (groups, heads // groups))
    log_decay_bcqh = chunks(dt_blh * rate_h)
    log_decay_bcgrq = log_decay_bcqh.movedim(2, -1).unflatten(2, (groups, heads // groups))
    total_bcgrq = log_decay_bcgrq.cumsum(-1)

    # Within a chunk: position s reaches position q through the decays of s+1 .. q.
    scores_bcgqs = torch.einsum("bcqgn,bcsgn->bcgqs", C_bcqgn, B_bcqgn)
    weights_bcgrqs = scores_bcgqs.unsqueeze(3) * _sum_segments(log_decay_bcgrq).exp()
    y_bcqgrp = torch.einsum("bcgrqs,bcsgrp->bcqgrp", weights_bcgrqs, x_bcqgrp)

    # Across chunks: each chunk's own contribution to the state at its end, then the recurrence.
    to_end_bcqgr = (total_bcgrq[..., -1:] - total_bcgrq).exp().movedim(-1, 2)
    added_bcgrpn = torch.einsum("bcqgn,bcqgrp->bcgrpn", B_bcqgn, x_bcqgrp * to_end_bcqgr[..., None])
    state_bgrpn = torch.zeros_like(added_bcgrpn[:, 0])
    starts = []
    for index in range(added_bcgrpn.shape[1]):
        starts.append(state_bgrpn)
        kept_bgr = total_bcgrq[:, index, ..., -1].exp()
        state_bgrpn = state_bgrpn * kept_bgr[..., None, None] + added_bcgrpn[:, index]
    carried_bcqgrp = torch.einsum("bcqgn,bcgrpn->bcqgrp", C_bcqgn, torch.stack(starts, dim=1))
    y_bcqgrp = y_bcqgrp + carried_bcqgrp * total_bcgrq.exp().movedim(-1, 2)[..., None]
    y_blhp: torch.Tensor = y_bcqgrp.flatten(3, 4).flatten(1, 2)[:, :length]
    return y_blhp


def _sum_segments(log_decay: torch.Tensor) -> torch.Tensor:
    """[..., q] to [..., q, s]: the sum over s+1 .. q, and -inf where s > q.

    Sums masked terms instead of subtracting two cumulative sums, which would cancel.
    """
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    terms = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    sums: torch.Tensor = terms.masked_fill(~ones.tril(-1), 0.0).cumsum(-2)
    return sums.masked_fill(~ones.tril(), -torch.inf)
