"""The demo's training model: a Nemotron-H with one multi-token-prediction block.

Goes in: token ids [B, T]. Comes out: logits [B, T, V] that equal those of transformers'
`NemotronHForCausalLM` on the same tensors, and the logits of the multi-token-prediction block.
Parameters carry NVIDIA's tensor names (`backbone.*`, `lm_head.*`, `mtp.*`).
"""

import math

import torch
from torch import Tensor, nn

from pipeline.demo.layers import Block, DemoConfig, RMSNorm, Router


class Backbone(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: DemoConfig, scan_chunk: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = config.hybrid_override_pattern
        self.layers = nn.ModuleList([Block(kind, config, scan_chunk) for kind in kinds])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Token ids [B, T] to normed hidden states [B, T, D]."""
        x: Tensor = self.embeddings(ids_BT)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm_f(x)
        return out


class MTPBlock(Block):
    """A block of the MTP stack: the first joins state and embedding, the last norms the result."""

    def __init__(self, index: int, config: DemoConfig, scan_chunk: int) -> None:
        kinds = config.mtp_hybrid_override_pattern
        super().__init__(kinds[index], config, scan_chunk)
        size, eps = config.hidden_size, config.layer_norm_epsilon
        if index == 0:
            self.enorm, self.hnorm = RMSNorm(size, eps), RMSNorm(size, eps)
            self.eh_proj = nn.Linear(2 * size, size, bias=False)
        if index == len(kinds) - 1:
            self.final_layernorm = RMSNorm(size, eps)


class MTP(nn.Module):
    """The multi-token-prediction block: from position t's state and token t+1 to token t+2."""

    def __init__(self, config: DemoConfig, scan_chunk: int) -> None:
        super().__init__()
        depth = len(config.mtp_hybrid_override_pattern)
        self.blocks = [MTPBlock(index, config, scan_chunk) for index in range(depth)]
        self.layers = nn.ModuleList(self.blocks)

    def forward(self, hidden: Tensor, embedded_next: Tensor) -> Tensor:
        """Final hidden states and the next tokens' embeddings, both [B, T, D], to [B, T, D]."""
        first, last = self.blocks[0], self.blocks[-1]
        x: Tensor = first.eh_proj(torch.cat([first.enorm(embedded_next), first.hnorm(hidden)], -1))
        for block in self.blocks:
            x = block(x)
        out: Tensor = last.final_layernorm(x)
        return out


class DemoModel(nn.Module):
    """The whole model; `scan_chunk` is the chunk length of the scan (a matter of speed alone)."""

    def __init__(self, config: DemoConfig, scan_chunk: int = 32) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, scan_chunk)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTP(config, scan_chunk)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of variance 1 / inputs; projections into the residual scaled down."""
        residual = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
        depth = len(self.config.hybrid_override_pattern)
        for name, parameter in self.named_parameters():
            if "conv1d" in name or parameter.dim() < 2:
                continue  # these are initialised where they are made
            if "embeddings" in name:
                parameter.normal_(std=1.0)
                continue
            std = 1 / math.sqrt(parameter.shape[-1])
            if any(part in name for part in residual):
                std /= math.sqrt(depth)
            parameter.normal_(std=std)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V] in fp32."""
        logits: Tensor = self.lm_head(self.backbone(ids_BT)).float()
        return logits

    def forward_with_mtp(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] to logits of token t+1 [B, T, V] and of token t+2 [B, T-1, V], fp32."""
        hidden = self.backbone(ids_BT)
        embedded_next = self.backbone.embeddings(ids_BT[:, 1:])
        ahead = self.mtp(hidden[:, :-1], embedded_next)
        return self.lm_head(hidden).float(), self.lm_head(ahead).float()

    def routers(self) -> dict[str, Router]:
        """Every router by the name of its layer, such as `backbone.layers.1`."""
        return {
            name.removesuffix(".mixer.gate"): module
            for name, module in self.named_modules()
            if isinstance(module, Router)
        }
