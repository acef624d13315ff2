"""Causal attention with grouped queries over the tensor-parallel group (no position encoding).

In: [seq/tp, batch, hidden]. Out: the same. Built from megatron's parallel linears, but not
megatron's SelfAttention: where there are fewer key/value heads than TP ranks, that one cuts the
key/value heads apart and gathers the projections of all ranks again, while a rank here holds the
whole key/value head that it shares (what `shard_of` says, and what is packed and stored).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.architecture import Architecture
from pipeline.mcore.kernels.activation import raise_amax
from pipeline.mcore.linear import column_parallel, row_parallel
from pipeline.mcore.tap import Probe

# In order of preference, where they take the shapes. cuDNN's kernel is 1.8 times as fast as flash
# attention on an H100, and writes the layout that o_proj reads; both repeat their bits.
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


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

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[seq/tp, batch, hidden] to the same; batch entries are separate sequences."""
        qkv, _ = self.qkv_proj(self.probe.quantize("qkv", hidden))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.rows, dim=-1))
        self.probe.activation("k_cache", k)
        self.probe.activation("v_cache", v)
        k, v = self.probe.quantize("k_cache", k), self.probe.quantize("v_cache", v)
        mixed_lbd = attend(q, k, v)
        amax = self.probe.amax_of("o_proj")
        if amax is not None:
            raise_amax(mixed_lbd, amax)
        output: torch.Tensor = self.o_proj(self.probe.quantize("o_proj", mixed_lbd))[0]
        return output


def attend(q_lbhp: torch.Tensor, k_lbgp: torch.Tensor, v_lbgp: torch.Tensor) -> torch.Tensor:
    """Causal attention of each sequence on its own, with softmax in fp32.

    Args:
        q_lbhp: Queries [seq, batch, heads, head_dim].
        k_lbgp: Keys [seq, batch, key/value heads, head_dim]; each serves heads / g queries.
        v_lbgp: Values of the same shape.

    Returns:
        Contiguous [seq, batch, heads * head_dim].
    """
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q_lbhp, k_lbgp, v_lbgp))
    grouped = q.shape[1] != k.shape[1]
    pinned = q.is_cuda and q.dtype is not torch.float32
    with sdpa_kernel(_BACKENDS, set_priority=True) if pinned else nullcontext():
        mixed_bhlp = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed_bhlp.permute(2, 0, 1, 3).flatten(2).contiguous()
