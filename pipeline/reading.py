"""Which weights a rank reads, and how.

In: the job, the source. Out: per layer the shards that a rank needs, and what brings them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.architecture import layer_tensors
from pipeline.checkpoint.read_ahead import ReadAhead
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.synthetic import SyntheticSource
from pipeline.evaluation.fidelity import Head
from pipeline.filling import Feed, FileFeed, Request, SyntheticFeed
from pipeline.job import Job
from pipeline.schedule import LayerSchedule, packs_expert
from pipeline.sharding import shard_of


class Reading(NamedTuple):
    """How a rank reads the source.

    Attributes:
        cast: Round F16 and F32 weights to BF16 as they are read.
        threads: That read.
        ahead_bytes: Host buffer of the read-ahead.
    """

    cast: bool
    threads: int = 2
    ahead_bytes: int = 2**28


def requests_of(job: Job, schedule: LayerSchedule, rank: int, *, all_shards: bool) -> list[Request]:
    """What a rank reads of one layer: all its shards, or only those that it packs."""
    dims, at = job.dims, job.dims.coordinates(rank)
    local = max(job.architecture.n_routed_experts // dims.ep, 1)
    packed = {item.spec.name for item in schedule.dense if item.replica == at.dp_rank}
    requests = []
    for spec in layer_tensors(job.architecture, schedule.layer):
        shard = shard_of(spec, job.architecture, dims, rank)
        if shard is None:
            continue
        if not all_shards:
            if spec.is_routed_expert:
                projection = spec.module.rpartition(".")[2]
                if projection not in schedule.experts:
                    continue
                if not packs_expert(spec.expert % local, at, dims):
                    continue
            elif spec.name not in packed:
                continue
        requests.append((spec, job.stored[spec.name].name, shard))
    return requests


def make_feed(
    source: Source,
    requests: Sequence[Sequence[Request]],
    device: torch.device,
    reading: Reading,
) -> Feed:
    """What brings the weights, layer by layer in the order of the requests."""
    if isinstance(source, SyntheticSource):
        return SyntheticFeed(source)
    ahead = ReadAhead(
        requests,
        source,
        threads=reading.threads,
        buffer_bytes=reading.ahead_bytes,
        pinned=device.type == "cuda",
    )
    return FileFeed(ahead, cast=reading.cast, device=device)


def read_head(job: Job, source: Source) -> Head:
    """Final norm and head, whole, as the source has them; the embedding where they are tied."""
    name = "lm_head.weight"
    if job.architecture.tie_word_embeddings:
        name = "backbone.embeddings.weight"
    norm, weight = (source.read(job.stored[n].name) for n in ("backbone.norm_f.weight", name))
    return Head(norm, weight, job.architecture.layer_norm_epsilon)
