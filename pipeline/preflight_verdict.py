"""Whether all ranks may start, from what each of them told: pure arithmetic and comparison.

In: the `Facts` of the ranks, and what the job needs altogether. Out: a `Verdict`: every reason not
to start, each said once with the ranks that it concerns, and warnings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from pipeline.errors import ClusterError, ConfigError, LayersweepError, OutputError, SourceError
from pipeline.memory import smallest_plan
from pipeline.preflight_facts import Facts
from pipeline.runtime.meeting import name_ranks

CLOCKS_S = 120.0
"""Hosts with a time service agree to milliseconds; journals and logs bear minutes."""
_NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the job will write, all ranks together.

    Attributes:
        bytes: Of the checkpoint, with what is there already left out.
        snapshots: Bytes of snapshots, as many as may lie there at a time.
        files: How many files.
    """

    bytes: int = 0
    snapshots: int = 0
    files: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the ranks are told.

    Attributes:
        faults: Reasons not to start.
        warnings: What should be known.
    """

    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def judge(told: Mapping[int, Facts], world: int, needs: Needs) -> Verdict:
    """Compares and adds up.

    Args:
        told: By rank; who is missing has not come.
        world: Number of ranks.
        needs: What will be written.
    """
    hosts = {rank: facts.peer.host for rank, facts in told.items()}
    faults: list[LayersweepError | str] = [*_missing(told, world)]
    faults += _said_by(told, world, lambda facts: [facts.refusal] if facts.refusal else [])
    ready = {rank: facts for rank, facts in told.items() if not facts.refusal}
    faults += _unequal_software(ready, hosts)
    faults += _unequal_settings(ready, hosts)
    faults += _unequal_sources(ready, hosts)
    faults += _said_by(ready, world, lambda facts: facts.faults)
    faults += _unseen_token(ready)
    faults += _full_disk(ready, needs)
    faults += _full_gpus(ready)
    faults += _full_hosts(ready)
    return Verdict(tuple(map(str, faults)), tuple(_warnings(ready, needs)))


def clock_warnings(offsets: Mapping[int, float], hosts: Mapping[int, str]) -> list[str]:
    """Hosts whose clocks are far from rank 0's.

    Args:
        offsets: Seconds by rank.
        hosts: By rank.
    """
    far = {hosts[rank]: offset for rank, offset in offsets.items() if abs(offset) > CLOCKS_S}
    return [
        f"the clock of {host} is {abs(offset) / 60:.1f} minutes "
        f"{'ahead of' if offset > 0 else 'behind'} that of {hosts.get(0, 'rank 0')}: times in logs "
        "and in run.json will not fit together"
        for host, offset in far.items()
    ]


def locate(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Ranks with their hosts: `"ranks 0-3 on node1, ranks 4-7 on node2"`."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    return ", ".join(f"{name_ranks(found)} on {host}" for host, found in by_host.items())


def _missing(told: Mapping[int, Facts], world: int) -> list[LayersweepError]:
    missing = [rank for rank in range(world) if rank not in told]
    if not missing:
        return []
    return [
        ClusterError(
            name_ranks(missing),
            value="nothing heard of them",
            rule=f"all {world} ranks must come before anything begins",
            remedy="see in the log of their hosts whether they were started, and whether they "
            "reach MASTER_ADDR:MASTER_PORT",
        )
    ]


def _said_by(
    told: Mapping[int, Facts], world: int, what: Callable[[Facts], Iterable[str]]
) -> list[str]:
    """What ranks say themselves, each text once; without ranks where all say it."""
    by_text: dict[str, list[int]] = {}
    for rank, facts in sorted(told.items()):
        for text in what(facts):
            by_text.setdefault(text, []).append(rank)
    hosts = {rank: facts.peer.host for rank, facts in told.items()}
    return [
        text if len(ranks) == world else f"{locate(ranks, hosts)}: {text}"
        for text, ranks in by_text.items()
    ]


def _unequal_software(ready: Mapping[int, Facts], hosts: Mapping[int, str]) -> list[str]:
    faults = _unequal({r: f.versions for r, f in ready.items()}, hosts)
    others = _unequal(
        {r: {"digest of Layersweep's own files": f.code} for r, f in ready.items()}, hosts
    )
    if not others or faults:  # another version has other files
        others = []
    return [
        str(
            ClusterError(
                "software",
                value=text,
                rule="all ranks must run the same, or they write different bytes, or hang",
                remedy="install the same versions on all hosts, or use one container image",
            )
        )
        for text in faults + others
    ]


def _unequal_settings(ready: Mapping[int, Facts], hosts: Mapping[int, str]) -> list[str]:
    return [
        str(
            ConfigError(
                text,
                rule="all ranks must have the same options",
                remedy="start every rank with the same command line and the same presets",
            )
        )
        for text in _unequal({rank: facts.settings for rank, facts in ready.items()}, hosts)
    ]


def _unequal_sources(ready: Mapping[int, Facts], hosts: Mapping[int, str]) -> list[str]:
    by_rank = {r: {"names, shapes and places of its tensors": f.source} for r, f in ready.items()}
    found = _unequal(by_rank, hosts)
    if not found:
        marks = {rank: facts.marks for rank, facts in ready.items()}
        found = _unequal(marks, hosts, "size and digest of the last bytes of ", partial=True)
    return [
        str(
            SourceError(
                "checkpoint",
                value=text,
                rule="all ranks must read the same source",
                remedy="copy it to every host again, whole, or use one that all hosts share",
            )
        )
        for text in found
    ]


def _unequal(
    values: Mapping[int, Mapping[str, str]],
    hosts: Mapping[int, str],
    prefix: str = "",
    *,
    partial: bool = False,
) -> list[str]:
    """Each name that has several values, with who has which; one text for too many names.

    Args:
        values: By rank and name.
        hosts: By rank.
        prefix: Of the names.
        partial: Whether ranks without a name are left out of the comparison.
    """
    by_name: dict[str, dict[str, list[int]]] = {}
    names = dict.fromkeys(name for of_rank in values.values() for name in of_rank)
    for rank, of_rank in sorted(values.items()):
        for name in of_rank if partial else names:
            ranks_of = by_name.setdefault(name, {})
            ranks_of.setdefault(of_rank.get(name, "missing"), []).append(rank)
    texts = [
        f"{prefix}{name} is "
        + ", but ".join(f"{value} on {locate(ranks, hosts)}" for value, ranks in found.items())
        for name, found in by_name.items()
        if len(found) > 1
    ]
    rest = len(texts) - _NAMES_SHOWN
    if rest > 0:
        texts = [*texts[:_NAMES_SHOWN], f"and {rest} more differences"]
    return texts


def _unseen_token(ready: Mapping[int, Facts]) -> list[LayersweepError]:
    blind = [rank for rank, facts in ready.items() if facts.sees_token is False]
    if not blind:
        return []
    hosts = {rank: facts.peer.host for rank, facts in ready.items()}
    room = ready[0].room if 0 in ready else None
    return [
        OutputError(
            f"output{'' if room is None else f' {room.path}'}",
            value=f"a file that rank 0 on {hosts.get(0, '?')} made there is not seen by "
            f"{locate(blind, hosts)}",
            rule="all ranks write to one directory, so all hosts must share its file system",
            remedy="choose an output on a file system that is mounted on every host",
        )
    ]


def _full_disk(ready: Mapping[int, Facts], needs: Needs) -> list[LayersweepError]:
    rooms = [facts.room for facts in ready.values() if facts.room is not None]
    if not rooms:
        return []
    least = min(rooms, key=lambda room: room.free)
    faults: list[LayersweepError] = []
    if least.free < needs.bytes:
        faults.append(
            OutputError(
                f"output {least.path}",
                value=f"{_gb(least.free)} free on its file system",
                rule=f"{_gb(needs.bytes)} are still to be written",
                remedy="make room, or choose another output (a quota does not show here: it may "
                "leave even less)",
            )
        )
    counted = [room for room in rooms if room.files is not None]
    for room in sorted(counted, key=lambda room: room.files or 0)[:1]:
        if room.files is not None and room.files < needs.files:
            faults.append(
                OutputError(
                    f"output {room.path}",
                    value=f"{room.files:,} more files (inodes) can be made on its file system",
                    rule=f"about {needs.files:,} will be",
                    remedy="remove files there, choose another output, or raise max_shard_gb",
                )
            )
    return faults


def _full_gpus(ready: Mapping[int, Facts]) -> list[str]:
    plan = smallest_plan(facts.memory for facts in ready.values())
    faults = []
    for rank, facts in sorted(ready.items()):
        gpu = facts.gpu
        if plan is None or gpu is None or gpu.free + gpu.ours >= plan.peak:
            continue
        others = f" ({gpu.others})" if gpu.others else " (nvidia-smi on that host shows which)"
        taken = gpu.total - gpu.free - gpu.ours
        error = ClusterError(
            f"GPU {gpu.index}, {gpu.name}",
            value=f"{_gib(gpu.free + gpu.ours)} of {_gib(gpu.total)} free: another process on the "
            f"card holds most of {_gib(taken)}{others}",
            rule=f"the plan needs {_gib(plan.peak)} of it",
            remedy="end that process, choose another card (CUDA_VISIBLE_DEVICES), or set a "
            "smaller calibration.micro_batch or hidden_store=host",
        )
        faults.append(f"rank {rank} on {facts.peer.host}: {error}")
    return faults


def _full_hosts(ready: Mapping[int, Facts]) -> list[str]:
    machines: dict[str, list[int]] = {}
    for rank, facts in ready.items():
        machines.setdefault(f"{facts.peer.host} {facts.peer.machine}", []).append(rank)
    hosts = {rank: facts.peer.host for rank, facts in ready.items()}
    faults = []
    for ranks in machines.values():
        left = [ready[rank].host_memory for rank in ranks]
        least = min((one for one in left if one is not None), key=lambda o: o.free, default=None)
        needed = sum(ready[rank].host_needs for rank in ranks)
        if least is None or least.free >= needed:
            continue
        error = ClusterError(
            "host memory",
            value=f"{_gib(least.free)} left ({least.limit})",
            rule=f"hidden states, reading ahead and staging of {len(ranks)} ranks take "
            f"{_gib(needed)}",
            remedy="ask for more memory, start fewer ranks on that host, or set a smaller "
            "read_ahead_gb",
        )
        faults.append(f"{locate(ranks, hosts)}: {error}")
    return faults


def _warnings(ready: Mapping[int, Facts], needs: Needs) -> list[str]:
    rooms = [facts.room for facts in ready.values() if facts.room is not None]
    least = min(rooms, key=lambda room: room.free, default=None)
    if least is not None and needs.bytes <= least.free < needs.bytes + needs.snapshots:
        return [
            f"{least.path}: {_gb(least.free)} free for {_gb(needs.bytes)} of checkpoint and "
            f"{_gb(needs.snapshots)} of snapshots: some of these will not be taken"
        ]
    return []


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"
