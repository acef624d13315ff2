"""Options of a cluster: what is refused, and that every message says what to do."""

from typing import Any

import pytest

from pipeline.cluster.options import (
    ContainerConfig,
    ContainerRuntime,
    LocalConfig,
    SlurmConfig,
    TorchrunConfig,
    seconds_of,
)
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("4:00:00", 14400),
        ("90:00", 5400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("240", None),
        ("4h", None),
        ("4:00:00:00", None),
        ("", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": 14400}, "YAML reads 4:00:00 without quotes"),
        ({"time": "90"}, "a bare number is minutes to Slurm"),
        ({"time": "soon"}, r"cluster\.time: found 'soon'"),
        ({"time": "0:03:00"}, r"longer than cluster\.signal_seconds=180"),
        ({"signal_seconds": 70000}, "at most 65535"),
        ({"signal_seconds": 0}, "at least 1"),
        ({"nodes": 0}, r"cluster\.nodes: found 0"),
        ({"gpus_per_node": -1}, "at least 0"),
        ({"ranks_per_node": 0}, "at least 1"),
        ({"cpus_per_task": 0}, "at least 1"),
        ({"max_restarts": -1}, "at least 0"),
        ({"max_restarts": 0, "restart_after_crash": True}, "raise cluster.max_restarts"),
        ({"partition": "a b"}, "one word"),
        ({"account": "x\n#SBATCH --begin=now"}, "one word"),
        ({"name": ""}, "one word"),
        ({"memory": "lots"}, "cluster.memory=512G"),
        ({"logs": ""}, "is a path"),
        ({"directives": ["constraint=h100"]}, "one option of sbatch"),
        ({"directives": ["--exclusive\nrm -rf x"]}, "one option of sbatch"),
        ({"directives": ["--signal=USR2"]}, r"use cluster\.signal_seconds"),
        ({"directives": ["-N 4"]}, r"use cluster\.nodes"),
        ({"directives": ["-N4"]}, r"use cluster\.nodes"),
        ({"directives": ["--ntasks 4"]}, "leave it out"),
        ({"environment": {"A-B": "x"}}, "a variable's name"),
        ({"setup": ["a\nb"]}, "single lines"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        SlurmConfig(**options)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": ContainerRuntime.pyxis}, r"container\.image: found nothing"),
        ({"image": "x.sif"}, r"container\.runtime: found nothing"),
        ({"mounts": ["/a"]}, "they go with a container"),
        (
            {"runtime": ContainerRuntime.pyxis, "image": "x", "mounts": ["data:/data"]},
            "absolute",
        ),
        (
            {"runtime": ContainerRuntime.pyxis, "image": "x", "mounts": ["/a,/b"]},
            "without commas",
        ),
    ],
)
def test_containers_that_cannot_be_started(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ContainerConfig(**options)


def test_machines_of_ones_own_check_their_options_too() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        TorchrunConfig(ranks_per_node=0)
    with pytest.raises(ConfigError, match="a variable's name"):
        LocalConfig(environment={"1A": "x"})


def test_other_directives_are_left_alone() -> None:
    directives = ["--constraint=h100", "--exclusive", "-C h100", "--mail-type=END"]
    assert SlurmConfig(directives=directives).directives == directives


@pytest.mark.parametrize(
    ("options", "ranks"),
    [({}, 8), ({"gpus_per_node": 0}, 1), ({"gpus_per_node": 0, "ranks_per_node": 3}, 3)],
)
def test_ranks_are_those_of_the_gpus(options: dict[str, Any], ranks: int) -> None:
    assert SlurmConfig(**options).ranks == ranks
