"""The layers of the demo's training model, written to be read and to train on a CPU.

Go in: hidden states [B, T, D]. Come out: hidden states that equal those of the layers of
transformers' `NemotronHForCausalLM` on the same tensors. Parameters carry NVIDIA's names; only the
experts are stacked here.

Dimensions: B sequences, T tokens, D hidden, V vocabulary, E experts, K experts per token,
L latent, F expert width, H heads, P width of a head, G groups, N state, C chunks, S chunk length.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The shape of the model; fields are named as in NVIDIA's config.json."""

    vocab_size: int = 512
    hidden_size: int = 128
    hybrid_override_pattern: str = "MEM*EMEME"
    mtp_hybrid_override_pattern: str = "*E"
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    mamba_num_heads: int = 8
    mamba_head_dim: int = 32
    n_groups: int = 4
    ssm_state_size: int = 32
    conv_kernel: int = 4
    chunk_size: int = 128
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    moe_latent_size: int = 64
    moe_intermediate_size: int = 128
    moe_shared_expert_intermediate_size: int = 256
    routed_scaling_factor: float = 2.5
    layer_norm_epsilon: float = 1e-5

    @property
    def mamba_intermediate_size(self) -> int:
        """Width of the Mamba mixer: heads times their width."""
        return self.mamba_num_heads * self.mamba_head_dim


class RMSNorm(nn.Module):
    """Root-mean-square norm in groups of `group_size` features, with one weight per feature."""

    def __init__(self, size: int, eps: float, group_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.group_size = eps, group_size or size

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape, in fp32 inside."""
        grouped = x.float().reshape(*x.shape[:-1], -1, self.group_size)
        normed = F.rms_norm(grouped, (self.group_size,), eps=self.eps)
        return (self.weight * normed.flatten(-2)).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention without positional embedding."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, query * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key * config.head_dim, bias=False)
        self.o_proj = nn.Linear(query * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (
            torch.unflatten(proj(x_BTD), -1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return out


class Conv(nn.Module):
    """Parameters of the causal depthwise convolution, named as nn.Conv1d names them."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(kernel)
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, channels] to the same shape: each output sees its own and earlier tokens."""
        kernel, length = self.weight.shape[-1], x_BTC.shape[1]
        padded = F.pad(x_BTC, (0, 0, kernel - 1, 0))
        taps = self.weight[:, 0].unbind(-1)
        y: Tensor = self.bias
        for offset, tap in enumerate(taps):
            y = y + padded[:, offset : offset + length] * tap
        return y


class Mamba(nn.Module):
    """Mamba-2 mixer: input projection, convolution, selective scan, gated norm, output."""

    def __init__(self, config: DemoConfig, scan_chunk: int) -> None:
        super().__init__()
        inner, heads = config.mamba_intermediate_size, config.mamba_num_heads
        groups_state = config.n_groups * config.ssm_state_size
        self.parts = [inner, inner, groups_state, groups_state, heads]  # z, x, B, C, dt
        self.config, self.scan_chunk = config, scan_chunk
        self.in_proj = nn.Linear(config.hidden_size, sum(self.parts), bias=False)
        self.conv1d = Conv(inner + 2 * groups_state, config.conv_kernel)
        # A in 1..16 and dt in 1e-3..0.1, log-uniform: the initialisation of the Mamba-2 paper.
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, config.layer_norm_epsilon, inner // config.n_groups)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        config, inner = self.config, self.parts[0]
        z, xbc, dt = torch.split(
            self.in_proj(x_BTD), [inner, sum(self.parts[1:4]), self.parts[4]], -1
        )
        x, b, c = torch.split(F.silu(self.conv1d(xbc)), self.parts[1:4], -1)
        x_BTHP = torch.unflatten(x, -1, (-1, config.mamba_head_dim)).float()
        y_BTHP = selective_scan(
            x_BTHP,
            F.softplus(dt.float() + self.dt_bias),
            -torch.exp(self.A_log),
            torch.unflatten(b, -1, (config.n_groups, -1)).float(),
            torch.unflatten(c, -1, (config.n_groups, -1)).float(),
            self.scan_chunk,
        )
        y = (y_BTHP + self.D[:, None] * x_BTHP).flatten(-2)
        out: Tensor = self.out_proj(self.norm(y * F.silu(z.float())).to(x_BTD.dtype))
        return out


def selective_scan(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, chunk: int
) -> Tensor:
    """The Mamba-2 recurrence h_t = exp(dt_t a) h_{t-1} + dt_t b_t x_t, y_t = c_t h_t, in chunks.

    Inside a chunk it is a masked product of queries c and keys b, between chunks a recurrence over
    one state per chunk (Dao & Gu 2024, "Transformers are SSMs", listing 1). T is padded to whole
    chunks. All fp32.

    Returns:
        y [B, T, H, P].
    """
    length = x_BTHP.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunks(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if pad else t
        return torch.unflatten(t, 1, (-1, chunk))

    groups, heads = b_BTGN.shape[2], x_BTHP.shape[2]
    # [B, C, G, H/G, ...]: heads of one group share b and c.
    x = torch.unflatten(chunks(x_BTHP * dt_BTH[..., None]), 3, (groups, -1))
    x = x.permute(0, 1, 3, 4, 2, 5)
    decay = torch.unflatten(chunks(dt_BTH * a_H), 3, (groups, -1)).permute(0, 1, 3, 4, 2)
    b, c = (chunks(t).transpose(2, 3) for t in (b_BTGN, c_BTGN))  # [B, C, G, S, N]

    total = decay.cumsum(-1)  # [B, C, G, H/G, S]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    gap = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf)
    scores = (c @ b.mT)[:, :, :, None] * gap.exp()
    y = scores @ x

    to_end = (total[..., -1:] - total).exp()[..., None]
    states = b[:, :, :, None].mT @ (x * to_end)  # [B, C, G, H/G, N, P]
    carried = torch.zeros_like(states[:, 0])
    before = []
    for index in range(states.shape[1]):
        before.append(carried)
        carried = carried * total[:, index, ..., -1].exp()[..., None, None] + states[:, index]
    y = y + (c[:, :, :, None] @ torch.stack(before, 1)) * total.exp()[..., None]
    return y.permute(0, 1, 4, 2, 3, 5).reshape(-1, length + pad, heads, y.shape[-1])[:, :length]


class MLP(nn.Module):
    """Squared-ReLU feed-forward of the shared expert."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        out: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return out


class Router(nn.Module):
    """Sigmoid router: a bias per expert takes part in the choice, never in the weight."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.tokens_E: Tensor
        zeros = torch.zeros(config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("tokens_E", zeros, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, D] to expert indices and weights, both [n, K]; counts tokens per expert."""
        scores = torch.sigmoid(F.linear(x.float(), self.weight))
        choice = scores.detach() + self.e_score_correction_bias
        indices = choice.topk(self.config.num_experts_per_tok, dim=-1).indices
        self.tokens_E += torch.bincount(indices.flatten(), minlength=scores.shape[-1])
        weights = scores.gather(-1, indices)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * self.config.routed_scaling_factor

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Move the bias of every expert by `rate` towards equal load, then start a new count.

        Loss-free balancing (Wang et al. 2024, arXiv 2408.15664): the sign of the load's error.
        """
        load = self.tokens_E.float()
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        self.e_score_correction_bias -= self.e_score_correction_bias.mean()
        self.tokens_E.zero_()


class Experts(nn.Module):
    """All routed experts, stacked: up [E, F, L] and down [E, L, F]."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.up_proj = nn.Parameter(torch.empty(experts, width, config.moe_latent_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.moe_latent_size, width))

    def forward(self, x_nL: Tensor, indices_nK: Tensor, weights_nK: Tensor) -> Tensor:
        """Sum over each token's experts of weight times down(relu(up(x)) squared): [n, L]."""
        order = indices_nK.flatten().argsort(stable=True)
        tokens = order // indices_nK.shape[1]
        counts = torch.bincount(indices_nK.flatten(), minlength=self.up_proj.shape[0]).tolist()
        parts = [
            F.linear(F.relu(F.linear(part, up)).square(), down)
            for part, up, down in zip(
                torch.split(x_nL[tokens], counts), self.up_proj, self.down_proj, strict=True
            )
        ]
        weighted = torch.cat(parts) * weights_nK.flatten()[order, None]
        out = torch.zeros_like(x_nL, dtype=weighted.dtype)
        return out.index_add(0, tokens, weighted).to(x_nL.dtype)


class MoE(nn.Module):
    """Latent mixture of experts with a shared expert in the full width."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        hidden, latent = config.hidden_size, config.moe_latent_size
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(hidden, config.moe_shared_expert_intermediate_size)
        self.fc1_latent_proj = nn.Linear(hidden, latent, bias=False)
        self.fc2_latent_proj = nn.Linear(latent, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = x_BTD.flatten(0, 1)
        indices, weights = self.gate(x)
        routed = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(x), indices, weights))
        out: Tensor = routed.view_as(x_BTD) + self.shared_experts(x_BTD)
        return out


def _mixer(kind: str, config: DemoConfig, scan_chunk: int) -> nn.Module:
    match kind:
        case "M":
            return Mamba(config, scan_chunk)
        case "*":
            return Attention(config)
        case "E":
            return MoE(config)
    raise ValueError(f"layer kind {kind!r}: the demo model has M, * and E")


class Block(nn.Module):
    """Norm, mixer and residual."""

    def __init__(self, kind: str, config: DemoConfig, scan_chunk: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _mixer(kind, config, scan_chunk)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        out: Tensor = x + self.mixer(self.norm(x))
        return out
