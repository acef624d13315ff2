"""What rank 0 makes of the facts, and where they come from: numbers and files without a cluster."""

import dataclasses
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from launch import entry
from pipeline.checkpoint.safetensors_file import TensorInfo
from pipeline.errors import ClusterError, ConfigError, JointError
from pipeline.memory import MemoryPlan
from pipeline.preflight import host_bytes
from pipeline.preflight_facts import (
    Facts,
    Gpu,
    HostMemory,
    Room,
    code_digest,
    look_at_host_memory,
    look_at_room,
    settings_of,
    source_digest,
)
from pipeline.preflight_verdict import Needs, clock_warnings, judge
from pipeline.preparation import Place
from pipeline.runtime.connecting import connecting
from pipeline.runtime.endings import Status
from pipeline.runtime.meeting import Meeting, name_ranks
from pipeline.runtime.peers import Peer
from tests.distributed.helpers import run_ranks
from tests.e2e.harness import golden_config

GIB = 2**30
PLAN = MemoryPlan(8, False, 20 * GIB, 30 * GIB, 10 * GIB, GIB, 7 * GIB, 29 * GIB)
IDLE = Gpu(0, "H100", 79 * GIB, 78 * GIB, 0, "")


def facts(rank: int, *, per_host: int = 4, **values: object) -> Facts:
    node = rank // per_host + 1
    peer = Peer(rank, f"node{node}", 100 + rank, "7", f"boot-{node}")
    return dataclasses.replace(Facts(peer), **values)  # type: ignore[arg-type]


def of_all(world: int = 8, **values: object) -> dict[int, Facts]:
    return {rank: facts(rank, **values) for rank in range(world)}


def the_fault(told: dict[int, Facts], needs: Needs | None = None, world: int = 8) -> str:
    verdict = judge(told, world, needs or Needs())
    assert len(verdict.faults) == 1, verdict.faults
    return verdict.faults[0]


def test_alike_ranks_have_no_faults_and_no_warnings() -> None:
    room = Room("/data", 500, None)
    told = of_all(
        versions={"torch": "2"},
        settings={"tp": "1"},
        marks={"a/b": "1 2"},
        room=room,
        memory=PLAN,
        gpu=IDLE,
        host_memory=HostMemory(200 * GIB, "MemAvailable"),
        host_needs=50 * GIB,
    )
    assert judge(told, 8, Needs(bytes=500, snapshots=0, files=10**9)) == judge({}, 0, Needs())


def test_equal_texts_are_said_once_with_their_ranks() -> None:
    told = of_all()
    for rank in (2, 5, 6, 7):
        told[rank] = facts(rank, faults=("a file is missing",))
    assert the_fault(told) == "rank 2 on node1, ranks 5-7 on node2: a file is missing"
    assert the_fault(of_all(faults=("a file is missing",))) == "a file is missing"


def test_missing_ranks_are_named() -> None:
    told = {rank: facts(rank) for rank in range(8) if rank not in (3, 4, 5, 7)}
    assert the_fault(told).startswith("ranks 3-5, 7: found nothing heard of them; all 8 ranks")


def test_a_refused_rank_is_not_compared() -> None:
    told = of_all(versions={"torch": "2"})
    told[1] = facts(1, refusal="no such directory")
    assert the_fault(told) == "rank 1 on node1: no such directory"


def test_many_differences_are_cut_short() -> None:
    told = of_all(2, settings={f"option{i}": "1" for i in range(9)})
    told[1] = facts(1, settings={f"option{i}": "2" for i in range(9)})
    faults = judge(told, 2, Needs()).faults
    assert len(faults) == 6
    assert faults[0].startswith("option0 is 1 on rank 0 on node1, but 2 on rank 1 on node1; ")
    assert faults[-1].startswith("and 4 more differences")


def test_an_option_that_a_rank_lacks() -> None:
    told = {0: facts(0, settings={"a": "1"}), 1: facts(1, settings={})}
    assert the_fault(told, world=2).startswith("a is 1 on rank 0 on node1, but missing on rank 1")


def test_ranks_that_read_other_files_are_not_compared() -> None:
    told = {0: facts(0, marks={"m/1": "x"}), 1: facts(1, marks={"m/2": "y"})}
    assert judge(told, 2, Needs()).faults == ()


def test_another_process_on_the_card() -> None:
    told = of_all(memory=PLAN, gpu=IDLE)
    busy = Gpu(1, "NVIDIA H100", 79 * GIB, 40 * GIB, GIB, "process 4711 uses 38000.000 MB")
    told[5] = facts(5, memory=PLAN, gpu=busy)
    fault = the_fault(told)
    assert fault.startswith(
        "rank 5 on node2: GPU 1, NVIDIA H100: found 41.0 GiB of 79.0 GiB free: another process on "
        "the card holds most of 38.0 GiB (process 4711 uses 38000.000 MB); the plan needs 61.0 GiB"
    )
    assert "CUDA_VISIBLE_DEVICES" in fault


def test_the_plan_that_all_ranks_follow_decides() -> None:
    """The rank with less memory planned less; then the others need no more."""
    small = dataclasses.replace(PLAN, micro_batch=1, hidden_on_host=True, hidden=GIB)
    told = of_all(memory=PLAN, gpu=dataclasses.replace(IDLE, free=40 * GIB))
    assert len(judge(told, 8, Needs()).faults) == 8
    told[3] = facts(3, memory=small, gpu=IDLE)
    assert judge(told, 8, Needs()).faults == ()


def test_ranks_of_a_host_share_its_memory() -> None:
    left = HostMemory(150 * GIB, "the limit of the control group /sys/fs/cgroup")
    told = of_all(host_memory=left, host_needs=30 * GIB)
    assert judge(told, 8, Needs()).faults == ()  # 4 * 30 on each host
    told |= {rank: facts(rank, host_memory=left, host_needs=40 * GIB) for rank in (4, 5, 6, 7)}
    fault = the_fault(told)
    assert fault.startswith("ranks 4-7 on node2: host memory: found 150.0 GiB left (the limit of")
    assert "of 4 ranks take 160.0 GiB" in fault
    assert "read_ahead_gb" in fault


def test_room_of_the_host_that_has_least() -> None:
    told = of_all(2, room=Room("/data", 100_000_000_000, 100))
    told[1] = facts(1, room=Room("/data", 90_000_000_000, 100))
    assert judge(told, 2, Needs(bytes=90_000_000_000, files=100)).faults == ()
    fault = the_fault(told, Needs(bytes=90_000_000_001), world=2)
    assert fault.startswith("output /data: found 90.00 GB free on its file system; 90.00 GB are")
    assert "a quota does not show" in fault
    assert "100 more files" in the_fault(told, Needs(files=101), world=2)


def test_snapshots_without_room_are_a_warning() -> None:
    told = of_all(2, room=Room("/data", 90_000_000_000, None))
    verdict = judge(told, 2, Needs(bytes=80_000_000_000, snapshots=20_000_000_000))
    assert verdict.faults == ()
    assert verdict.warnings == (
        "/data: 90.00 GB free for 80.00 GB of checkpoint and 20.00 GB of snapshots: some of these "
        "will not be taken",
    )


def test_clocks() -> None:
    hosts = {0: "node1", 1: "node1", 2: "node2", 3: "node2"}
    assert clock_warnings({1: 0.1, 2: -100.0, 3: 119.0}, hosts) == []
    assert clock_warnings({1: 0.1, 2: -301.0, 3: -300.0}, hosts) == [
        "the clock of node2 is 5.0 minutes behind that of node1: times in logs and in run.json "
        "will not fit together"
    ]


# --- facts


def test_memory_of_the_host_without_control_groups(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    2048 kB\n")
    found = look_at_host_memory(tmp_path / "meminfo", tmp_path / "none", tmp_path)
    assert found == HostMemory(2 << 20, "MemAvailable")
    assert look_at_host_memory(tmp_path / "nothing") is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["", "job/step"])
def test_memory_that_a_control_group_leaves(version: int, limited: str, tmp_path: Path) -> None:
    """The tightest of the group and those above it counts; what gives way is not counted."""
    (tmp_path / "meminfo").write_text("MemAvailable:  999999 kB\n")
    names = ("memory.max", "memory.current", "inactive_file")
    line, root = "0::/job/step\n", tmp_path
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        line, root = "4:cpu,memory:/job/step\n0::/\n", tmp_path / "memory"
    (tmp_path / "cgroup").write_text(line)
    for group, limit in (("", 9 << 20), ("job", 7 << 20), ("job/step", 8 << 20)):
        directory = root / group
        directory.mkdir(parents=True, exist_ok=True)
        is_limited = group == limited or group == "job"
        (directory / names[0]).write_text(f"{limit}\n" if is_limited else "max\n")
        (directory / names[1]).write_text(f"{2 << 20}\n")
        (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {1 << 20}\nfile 3\n")
    found = look_at_host_memory(tmp_path / "meminfo", tmp_path / "cgroup", tmp_path)
    assert found == HostMemory(6 << 20, f"the limit of the control group {root / 'job'}")


def test_this_machine_has_memory_and_room(tmp_path: Path) -> None:
    found = look_at_host_memory()
    assert found is None or found.free > 2**20
    room = look_at_room(tmp_path / "not" / "there")
    assert room.path == str(tmp_path)
    assert room.free > 0


def test_host_memory_of_a_rank() -> None:
    assert host_bytes(PLAN, is_on_gpu=True) == PLAN.host + 144 * 2**20
    assert host_bytes(PLAN, is_on_gpu=False) == PLAN.host + PLAN.slots + PLAN.hidden


def test_settings_by_full_name(tmp_path: Path) -> None:
    settings = settings_of(golden_config(tmp_path / "out", data=[{"path": "a", "weight": 2}]))
    assert settings["calibration.seq_len"] == "96"
    assert settings["device"] == "cpu"
    assert settings["data"] == "[{'path': 'a', 'weight': 2}]"


def test_digests_follow_content(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    (tmp_path / "a.yaml").write_text("a: 2\n")
    assert code_digest(tmp_path) != before

    infos = [TensorInfo("a", "BF16", (1,), Path("x"), start, start + 2) for start in (0, 8)]
    assert source_digest({"a": infos[0]}) != source_digest({"a": infos[1]})


# --- meeting, connecting, speaking


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 3], "ranks 0-3"), ([7, 0, 2, 1], "ranks 0-2, 7")],
)
def test_name_ranks(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text


def test_several_meetings_of_one_process() -> None:
    def job(rank: int) -> list[str]:
        said = []
        for number in range(3):
            meeting = Meeting(rank, 3)
            meeting.tell(f"{number}{rank}")
            if rank == 0:
                answer = "".join(meeting.hear().values())
                meeting.answer(answer, range(3))
            else:
                answer = meeting.answered()
            said.append(answer)
        return said

    assert run_ranks(job, 3) == [["000102", "101112", "202122"]] * 3


def test_a_meeting_point_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.meeting.JOIN_S", 1.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ClusterError, match=r"meeting point 127\.0\.0\.1:9 .*found not reached"):
        Meeting(1, 2)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc] Connection refused\nmore"),
        dist.DistBackendError("NCCL error: remote process exited\nmore"),
    ],
)
def test_ranks_that_cannot_connect(error: RuntimeError) -> None:
    with pytest.raises(ClusterError) as caught, connecting(1, 2):
        raise error
    assert f"connecting the ranks: found {str(error).splitlines()[0]}; every rank" in str(
        caught.value
    )
    assert "GLOO_SOCKET_IFNAME" in str(caught.value)


def test_other_errors_while_connecting_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"), connecting(0, 2):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(ConfigError), connecting(0, 2):
        raise ConfigError("option")


def test_ranks_that_hang_while_they_connect(capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    has_left = threading.Event()

    def leave(status: int) -> None:
        left.append(status)
        has_left.set()

    with connecting(0, 2, 0.1, leave):
        assert has_left.wait(5)
    assert left == [Status.refused]
    assert "layersweep: error (rank 0): connecting the ranks: found no connection" in (
        capfd.readouterr().err
    )
    with connecting(0, 2, 0.1, leave):
        pass
    with connecting(0, 1, 0.1, leave):
        time.sleep(0.3)
    assert left == [Status.refused]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_speaks_for_all(
    rank: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "OTHERS_WAIT_S", 0.0)

    def refuse() -> int:
        raise JointError("2 reasons not to start\n  - one\n  - two")

    assert entry.attempt(refuse, Place(rank, 2, rank)) == Status.refused
    sys.stderr.flush()
    said = "layersweep: error: 2 reasons not to start\n  - one\n  - two\n"
    assert capfd.readouterr().err == ("" if rank else said)
