"""Mamba-2's state space scan (SSD) in plain torch: the stand-in where mamba_ssm cannot run.

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


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
) -> torch.Tensor:
    """Same name and meaning as mamba_ssm's kernel, without gating and carried-in states.

    Args:
        x: Inputs [b, l, h, p].
        dt: Time steps [b, l, h], before bias and softplus.
        A: Negative decay rates [h].
        B: Input projections [b, l, g, n].
        C: Output projections [b, l, g, n].
        chunk_size: Positions per chunk.
        D: Skip weights [h].
        z: Not supported (the gate is applied by the norm that follows).
        dt_bias: Bias of the time steps [h].
        dt_softplus: Whether the time steps go through softplus.
        initial_states: Not supported.
        return_final_states: Not supported.

    Returns:
        Outputs [b, l, h, p] in the dtype of `x`.
    """
    assert z is None, "the gate belongs to the norm"
    assert initial_states is None, "calibration sequences start from an empty state"
    assert not return_final_states, "calibration does not decode"
    dt = dt.float()
    if dt_bias is not None:
        dt = dt + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)
    y = scan_chunks(x.float(), dt, A.float(), B.float(), C.float(), chunk_size)
    if D is not None:
        y = y + x.float() * D.float().unsqueeze(-1)
    return y.to(x.dtype)


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
