"""Causal attention with grouped queries over the tensor-parallel group (no position encoding).

In: [seq/tp, batch, hidden]. Out: the same. Built from megatron's parallel linears, but not
megatron's SelfAttention: where there are fewer key/value heads than TP ranks, that one cuts the
key/value heads apart and gathers the projections of all ranks again, while a rank here holds the
whole key/value head that it shares (what `shard_of` says, and what is packed and stored).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pipeline.architecture import Architecture
from pipeline.mcore.linear import column_parallel, row_parallel
from pipeline.mcore.tap import Probe


class Attention(nn.Module):
    """One projection for queries, keys and values; its local rows are `[q, k, v]`.

    Attributes:
        rows: Local rows of q, k and v.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        probe: Probe,
    ) -> None:
        super().__init__()
        a, tp_group = architecture, pg_collection.tp
        degree = tp_group.size()
        queries = a.num_attention_heads * a.head_dim
        kv_heads = max(a.num_key_value_heads // degree, 1)
        self.rows = (queries // degree, kv_heads * a.head_dim, kv_heads * a.head_dim)
        self.head_dim = a.head_dim
        self.probe = probe
        self.qkv_proj = column_parallel(
            a.hidden_size, sum(self.rows) * degree, config, tp_group, bias=a.attention_bias
        )
        self.o_proj = row_parallel(queries, a.hidden_size, config, tp_group, bias=a.attention_bias)
        probe.watch_input(self.qkv_proj, "qkv")
        probe.watch_input(self.o_proj, "o_proj")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same; batch entries are separate sequences."""
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.rows, dim=-1))
        self.probe.activation("k_cache", k)
        self.probe.activation("v_cache", v)
        # [seq, batch, heads, head_dim] to [batch, heads, seq, head_dim]
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        output: torch.Tensor = self.o_proj(mixed.permute(2, 0, 1, 3).flatten(2))[0]
        return output
