"""What is concluded from a run's files, in every state they can be in, torn and missing too."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import pytest

from launch import status as command
from pipeline.checkpoint.attempts import Attempts
from pipeline.checkpoint.publish import WorkDirectory
from pipeline.cluster.describe import describe
from pipeline.cluster.run_files import output_of, read_run
from pipeline.cluster.status import EXIT_STATUSES, RunStatus, State, judge, to_values
from pipeline.errors import RecipeError
from pipeline.runtime.endings import ending_of
from pipeline.runtime.launcher import slurm_job
from pipeline.runtime.life import Life, Phase
from pipeline.runtime.peers import this_process
from pipeline.runtime.signs import Signs, write_failure

NOW = 1_800_000_000.0


class Recorded:
    """Writes the files of a run, as the ranks would."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.work = output.with_name(output.name + ".partial")
        self.attempt = 0

    def began(self, time: float = NOW - 600, **facts: Any) -> Self:
        self.attempt += 1
        facts = {"world": 2, "hosts": ["node1", "node2"], "layout": "ep=2", **facts}
        return self.line({"event": "began", "time": time, "restart": 0, **facts})

    def ended(self, time: float, how: str, why: str = "") -> Self:
        return self.line({"event": "ended", "time": time, "how": how, "why": why})

    def line(self, values: dict[str, Any]) -> Self:
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "attempts.jsonl").open("a") as file:
            file.write(json.dumps({"attempt": self.attempt, **values}) + "\n")
        return self

    def sign(self, rank: int, *, updated: float = NOW - 3, **values: Any) -> Self:
        place = {"phase": "forward", "layer": 37, "layers": 108, "done": 37, "since": NOW - 5}
        first = {"tokens_per_s": 12345.6, "left_s": 1084.0, "peak_gib": 64.21} if rank == 0 else {}
        who = {"rank": rank, "world": 2, "host": f"node{rank + 1}", "pid": 7}
        return self.write(
            f"state/rank-{rank:05d}.json",
            {**who, "attempt": self.attempt, "updated": updated, **place, **first, **values},
        )

    def failure(self, **values: Any) -> Self:
        found = {"rank": 1, "host": "node2", "layer": 37, "phase": "forward"}
        record = {**found, "cause": "it broke", "time": NOW - 9, "attempt": self.attempt, **values}
        return self.write("state/failure.json", record)

    def commit(self, layers: int) -> Self:
        for layer in range(layers):
            self.write(f"journal/layer-{layer:05d}.commit.json", {})
        return self.write("journal/unit-embeddings.commit.json", {})

    def stop(self) -> Self:
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "stop").touch()
        return self

    def publish(self, *, rejected: bool = False) -> Self:
        lines = self.work / "attempts.jsonl"
        text = lines.read_text() if lines.exists() else ""
        attempts = [json.loads(line) for line in text.splitlines()]
        target = self.output.with_name(self.output.name + ".rejected" * rejected)
        (target / "layersweep").mkdir(parents=True)
        (target / "layersweep" / "run.json").write_text(json.dumps({"attempts": attempts}))
        return self

    def write(self, name: str, values: dict[str, Any]) -> Self:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
        return self

    def judged(self, **options: Any) -> RunStatus:
        return judge(read_run(self.output), NOW, **options)


@pytest.fixture
def run(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path / "Ultra-NVFP4")


# ---- states


def test_nothing_there(run: Recorded) -> None:
    status = run.judged()
    assert (status.state, status.exit_status) == (State.absent, 2)
    assert f"neither {run.output} nor {run.work}" in describe(status)


def test_running(run: Recorded) -> None:
    run.began(NOW - 600, slurm_job_id="77").commit(35)
    run.sign(0).sign(1, done=36, layer=36, phase="read", since=NOW - 31, updated=NOW - 4)
    status = run.judged()
    assert (status.state, status.exit_status) == (State.running, 3)
    assert describe(status) == (
        f"running: layer 37 (forward), 37 of 108 done\n"
        f"  work       {run.work}\n"
        f"  committed  35 layers, which a restart does not pack again\n"
        f"  speed      12,346 tok/s, 18 min 04 s left, peak 64.21 GiB\n"
        f"  heard of   3 s ago; 2 ranks on node1 node2\n"
        f"  slowest    rank 1 on node2: layer 36 (read), 36 of 108 done, for 31 s\n"
        f"  attempt    1, Slurm job 77: running for 10 min 00 s\n"
        f"  next       wait; to stop it after the layer in hand: touch {run.work}/stop\n"
    )


def test_a_run_that_has_only_begun(run: Recorded) -> None:
    run.began(NOW - 10)
    status = run.judged()
    assert status.state is State.running
    assert describe(status).startswith("running: it has begun\n")


def test_signs_of_an_earlier_attempt_are_not_counted(run: Recorded) -> None:
    run.began(NOW - 900).sign(0, updated=NOW - 800).ended(NOW - 700, "failed", "x").began(NOW - 10)
    status = run.judged()
    assert (status.state, status.signs) == (State.running, ())


def test_asked_to_stop(run: Recorded) -> None:
    text = describe(run.began().sign(0).stop().judged())
    assert text.startswith("running: layer 37 (forward), 37 of 108 done; asked to stop after")
    assert "wait: it ends after the layer in hand" in text


def test_publishing_is_running(run: Recorded) -> None:
    run.began().sign(0, phase="audit", layer=None, done=108).ended(NOW - 1, "finished")
    status = run.judged()
    assert (status.state, describe(status).splitlines()[0]) == (State.running, "running: audit")


@pytest.mark.parametrize("how", ["stopped", "failed", "refused", "died"])
def test_ended(how: str, run: Recorded) -> None:
    run.began(NOW - 600).sign(0).ended(NOW - 60, how, "the reason").commit(4)
    status = run.judged()
    state = {"stopped": State.stopped, "refused": State.refused}.get(how, State.dead)
    assert status.state is state
    text = describe(status)
    assert f"attempt    1: {how} after 9 min 00 s: the reason" in text
    assert "committed  4 layers" in text
    assert "same command again" in text.splitlines()[-1]


def test_dead_without_a_word(run: Recorded) -> None:
    run.began().sign(0, updated=NOW - 200).sign(1, updated=NOW - 180)
    status = run.judged()
    assert (status.state, status.exit_status) == (State.dead, 4)
    text = describe(status)
    assert text.startswith("dead: its ranks are no longer heard of\n")
    assert "heard of   3 min 00 s ago" in text
    assert "1: no end is recorded" in text


def test_one_rank_alive_is_alive_and_the_silent_one_is_named(run: Recorded) -> None:
    text = describe(run.began().sign(0).sign(1, updated=NOW - 90).judged())
    assert text.startswith("running")
    assert "silent     rank 1 on node2: last heard of 1 min 30 s ago" in text


def test_known_to_be_over_is_not_waited_for(run: Recorded) -> None:
    run.began(NOW - 100).sign(0, updated=NOW - 1)
    assert run.judged().state is State.running
    status = run.judged(started_at=NOW - 120)
    assert (status.state, status.why) == (State.dead, "its processes ended without a word")


def test_a_start_that_never_began_was_refused(run: Recorded) -> None:
    """Else a start that is refused would pass for the stop before it, again and again."""
    assert run.judged(started_at=NOW - 100).state is State.refused
    run.began(NOW - 500).ended(NOW - 400, "stopped", "SIGUSR1")
    assert run.judged(started_at=NOW - 600).state is State.stopped
    status = run.judged(started_at=NOW - 100)
    assert (status.state, status.exit_status) == (State.refused, 2)
    assert "its own message says why" in describe(status)


def test_the_first_failure_is_told(run: Recorded) -> None:
    run.began().sign(0).failure().ended(NOW - 5, "failed", "it broke")
    text = describe(run.judged())
    assert "failure    rank 1 on node2, layer 37, forward: it broke" in text


def test_the_failure_of_an_earlier_attempt_is_not(run: Recorded) -> None:
    run.began().failure().ended(NOW - 500, "failed", "x").began(NOW - 20)
    assert "  failure " not in describe(run.judged())


def test_finished(run: Recorded) -> None:
    run.began(NOW - 900).ended(NOW - 600, "stopped", "SIGUSR1").began(NOW - 500)
    run.ended(NOW - 100, "finished").publish()
    status = run.judged()
    assert (status.state, status.exit_status) == (State.finished, 0)
    assert describe(status) == (
        f"finished: {run.output}\n"
        "  attempt    1: stopped after 5 min 00 s: SIGUSR1\n"
        "  attempt    2: finished after 6 min 40 s\n"
        f"  next       layersweep-verify {run.output}\n"
    )


def test_rejected(run: Recorded) -> None:
    status = run.began().ended(NOW - 1, "rejected").publish(rejected=True).judged()
    assert (status.state, status.exit_status) == (State.rejected, 1)
    assert f"{run.output}.rejected/layersweep/report.html" in describe(status)


def test_many_attempts_are_cut_to_the_last(run: Recorded) -> None:
    for number in range(9):
        run.began(NOW - 9000 + number).ended(NOW - 8000, "stopped", "x")
    text = describe(run.judged())
    assert "(3 earlier ones)" in text
    assert "attempt    9: stopped" in text
    assert "attempt    3:" not in text


def test_a_rehearsal_is_found_by_the_directory_of_its_report(tmp_path: Path) -> None:
    inside = Recorded(tmp_path / "report")
    inside.work = tmp_path / "report" / ".work"
    inside.began().sign(0)
    assert inside.judged().state is State.running
    (tmp_path / "report" / "run.json").write_text("{}")
    assert inside.judged().state is State.finished


def test_every_state_has_an_exit_status() -> None:
    assert set(EXIT_STATUSES) == set(State)


# ---- names and broken files


@pytest.mark.parametrize("ending", ["", ".partial", ".rejected"])
def test_each_name_of_a_run_leads_to_it(ending: str, run: Recorded) -> None:
    run.began().sign(0)
    assert read_run(Path(f"{run.output}{ending}")).output == run.output


def test_names_are_those_of_the_run_itself(tmp_path: Path) -> None:
    work = WorkDirectory.beside(tmp_path / "x")
    files = read_run(tmp_path / "x")
    assert (files.output, files.work) == (work.final, work.root)
    assert work.rejected == tmp_path / "x.rejected"
    assert (work.state, work.attempts) == (work.root / "state", work.root / "attempts.jsonl")
    assert (work.stop, work.journal) == (work.root / "stop", work.root / "journal")


def test_an_output_whose_own_name_ends_like_ours(tmp_path: Path) -> None:
    Recorded(tmp_path / "x.partial").began().sign(0)
    assert output_of(tmp_path / "x.partial") == tmp_path / "x.partial"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"rank": "x"}', b"\xff\xfe"])
def test_torn_files_are_not_there(content: bytes, run: Recorded) -> None:
    run.began().sign(0).sign(1).failure()
    (run.work / "state" / "rank-00001.json").write_bytes(content)
    (run.work / "state" / "failure.json").write_bytes(content)
    with (run.work / "attempts.jsonl").open("ab") as file:
        file.write(content + b'\n{"attempt": 2, "ev')
    status = run.judged()
    assert status.state is State.running
    assert [sign.rank for sign in status.signs] == [0]
    assert len(status.files.attempts) == 1
    describe(status)
    json.dumps(to_values(status))


def test_fields_of_other_types_are_not_there(run: Recorded) -> None:
    odd: dict[str, Any] = {"layer": "37", "done": None, "left_s": "soon", "host": 5, "world": 1.5}
    run.began(hosts="node1").sign(0, **odd).failure(rank=None, layer="x", cause=None)
    status = run.judged()
    assert status.signs[0].layer is None
    describe(status)


def test_a_work_directory_without_records(run: Recorded) -> None:
    run.work.mkdir()
    status = run.judged()
    assert (status.state, status.why) == (State.dead, "no attempt is recorded")


def test_a_file_in_the_place_of_a_directory(run: Recorded) -> None:
    run.work.write_text("")
    assert run.judged().state is State.absent


# ---- the command


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["layersweep-status", *map(str, words)])
    monkeypatch.setattr(command.time, "time", lambda: NOW)
    with pytest.raises(SystemExit) as end:
        command.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_command_answers_in_words(
    run: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.began().sign(0)
    assert call(monkeypatch, run.output) == 3
    assert capsys.readouterr().out.startswith("running: layer 37")


def test_command_answers_scripts(
    run: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.began(slurm_job_id="77").sign(0).sign(1, done=30).ended(NOW - 1, "stopped", "SIGUSR1")
    assert call(monkeypatch, "output=json", run.work) == 75
    values = json.loads(capsys.readouterr().out)
    assert values["state"] == "stopped"
    assert values["exit_status"] == 75
    assert (values["layer"], values["layers"], values["attempt"]) == (37, 108, 1)
    assert values["attempts"][0]["slurm_job"] == "77"
    assert len(values["ranks"]) == 2


def test_command_takes_a_directory_with_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recorded(tmp_path / "lr=1 [a]").began(NOW - 50).sign(0)
    assert call(monkeypatch, run.output, f"started_at={NOW - 99}") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no directory"),
        (["a", "b"], "b"),
        (["a", "output=xml"], "expected one of [text, json]"),
        (["a", "started_at=noon"], "noon"),
    ],
)
def test_command_refuses(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("layersweep: error: ")
    assert message in error


def test_help_explains_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"{name}:" in shown for name in ("directory", "started_at", "output"))


def test_nothing_slow_is_imported() -> None:
    """An answer within a second: torch alone takes several."""
    code = "import sys, launch.status; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) & {"torch", "megatron", "modelopt", "hydra", "numpy"} == set()


# ---- what the ranks really write


def test_the_ranks_own_files_are_understood(tmp_path: Path) -> None:
    """The writers of the run, and the reader that shares no code with them."""
    work = WorkDirectory.beside(tmp_path / "x")
    work.root.mkdir()
    attempts, life, me = Attempts(work), Life(), this_process(0)
    attempts.begin({"world": 1, "hosts": [me.host], "layout": "world=1", **slurm_job()})
    life.enter(Phase.read, 3)
    life.layers, life.figures = 9, {"tokens_per_s": 10.0, "left_s": 5.0, "peak_gib": 1.5}
    Signs(work.state, me, 1, 1, life, stop_file=None, found_stop=lambda: None).close()
    running = judge(read_run(work.root), time.time())
    assert (running.state, running.speaker and running.speaker.layer) == (State.running, 3)
    assert "running: layer 3 (read), 0 of 9 done" in describe(running)
    assert "10 tok/s, 5 s left, peak 1.50 GiB" in describe(running)

    ending = ending_of(RecipeError("x", value="y"), 0, me.host, life, False)
    write_failure(work.state, ending.failure(1))
    attempts.end(ending.how, ending.why)
    refused = judge(read_run(work.root), time.time())
    assert refused.state is State.refused
    assert f"failure    rank 0 on {me.host}, layer 3, read: x: found y" in describe(refused)

    attempts.begin({"world": 1, "hosts": [me.host], "layout": "world=1", **slurm_job()})
    again = judge(read_run(work.root), time.time())
    assert (again.state, again.failure, len(again.files.attempts)) == (State.running, None, 2)
