"""A run on two hosts: as on one; and what happens when the network between them goes away."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import GOLDEN, GOLDEN_SIZE, read_checkpoint, run_job
from tests.network.hosts import STRAGGLERS_S, Hosts, end, two_hosts, why_not

pytestmark = pytest.mark.cluster

FAILURE_S = 8
"""Without a sign of life."""
ENDING_S = 30
"""Beyond that: last words, launchers, interpreters that are shut down on a busy machine."""
START_S = 240


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_job(tmp_path_factory.mktemp("one") / "out", world=2, ep=2)


class Run:
    """A job on both hosts."""

    def __init__(self, hosts: Hosts, output: Path) -> None:
        words = [
            "launch.calibrate",
            f"checkpoint={GOLDEN / 'source'}",
            f"output={output}",
            "recipe=nvfp4_four_over_six",
            f"data={GOLDEN / 'calibration_ids.npy'}",
            *(f"calibration.{name}={value}" for name, value in GOLDEN_SIZE.items()),
            *("evaluation.num_sequences=0", "parallel.ep=2", "device=cpu", "allow_bad_loss=true"),
            f"failure_seconds={FAILURE_S}",
        ]
        self.partial = output.with_name(f"{output.name}.partial")
        self.logs = [output.with_name(f"{output.name}-{name}.log") for name in hosts.names]
        self.processes = [
            hosts.start(node, hosts.torchrun(node, *words), log)
            for node, log in enumerate(self.logs)
        ]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            end(process)

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses of both launchers; nothing may be left behind them."""
        deadline = time.monotonic() + seconds
        try:
            statuses = [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:.0f} s\n{self.told}")
        assert "LEFT: " not in self.told, self.told
        return statuses

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not is_so():
            assert all(process.poll() is None for process in self.processes), self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.01)

    @property
    def told(self) -> str:
        texts = [log.read_text(errors="replace") for log in self.logs]
        return "\n".join(
            f"--- {log.name}\n{text}" for log, text in zip(self.logs, texts, strict=True)
        )

    def last_words(self, node: int) -> list[str]:
        """The lines for the user, of how a run ended."""
        lines = self.logs[node].read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith("layersweep: ")]


def test_two_hosts_make_what_one_makes(hosts: Hosts, one_host: Path, tmp_path: Path) -> None:
    with Run(hosts, tmp_path / "out") as run:
        assert run.wait(START_S) == [0, 0], run.told
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(one_host)
    assert not run.partial.exists()
    report = json.loads((tmp_path / "out" / "layersweep" / "run.json").read_text())
    assert report["attempts"][0]["hosts"] == list(hosts.names)


def test_the_network_goes_away_in_mid_sweep(hosts: Hosts, one_host: Path, tmp_path: Path) -> None:
    """Both sides end by themselves, each with one message; then the run goes on."""
    with Run(hosts, tmp_path / "out") as run:
        commit = run.partial / "journal" / "layer-00001.commit.json"
        try:
            run.wait_until(commit.exists)
            hosts.cut()
            begun = time.monotonic()
            statuses = run.wait(FAILURE_S + ENDING_S + STRAGGLERS_S)
        finally:
            hosts.mend()
        took = time.monotonic() - begun
    assert 0 not in statuses, run.told
    assert took > FAILURE_S / 2, run.told
    for node in (0, 1):
        (words,) = run.last_words(node)
        assert words.startswith("layersweep: failed: rank "), words
        assert "The same command " in words
    assert commit.exists()
    with Run(hosts, tmp_path / "out") as again:
        assert again.wait(START_S) == [0, 0], again.told
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(one_host)
    report = json.loads((tmp_path / "out" / "layersweep" / "run.json").read_text())
    assert [line["event"] for line in report["attempts"]] == ["began", "ended"] * 2
    assert report["attempts"][1]["how"] == "failed"
