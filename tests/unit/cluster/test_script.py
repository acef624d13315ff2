"""The batch script: what it says, that it is plain bash, and what it does when it is run."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.options import JobName
from pipeline.cluster.script import render
from pipeline.errors import ConfigError
from tests.unit.cluster.scripts import PYTHON, Stage, make_config, make_job

GOLDEN = Path(__file__).parent / "golden"
SITE = {
    "partition": "batch",
    "account": "quantization",
    "nodes": 2,
    "time": "4:00:00",
    "memory": "512G",
    "directives": ["--constraint=h100", "--exclusive"],
    "environment": {"NCCL_SOCKET_IFNAME": "ib0"},
    "setup": ["module load cuda"],
}
PYXIS = {
    "runtime": "pyxis",
    "image": "nvcr.io#site/layersweep:1",
    "mounts": ["/lustre/models:/models", "/lustre/data"],
}
SCRIPTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two_nodes.sh": (SITE, {}),
    "restart_after_crash.sh": ({"restart_after_crash": True, "max_restarts": 1}, {}),
    "no_restarts.sh": ({"max_restarts": 0}, {}),
    "pyxis.sh": ({"nodes": 2, "container": PYXIS}, {}),
    "apptainer.sh": (
        {
            "container": {
                "runtime": "apptainer",
                "image": "/images/layersweep.sif",
                "mounts": ["/data"],
                "options": ["--env", "A=b c"],
            }
        },
        {},
    ),
    "verify.sh": ({}, {"name": JobName.verify, "words": ("/models/X",), "output": None}),
}
TORTURE = [
    "plain",
    "two words",
    "it's",
    'a "quoted" one',
    "$HOME and ${HOME} and $(echo no) and `echo no`",
    "back\\slash \\$x \\\" \\' \\\\",
    "tab\tand\nline break",
    "*?[a-z]{a,b}~!#;&|<>()",
    "-n",
    "",
    "data='[{path: a.jsonl, weight: 2}, {path: \"b c.jsonl\"}]'",
    "ünïcode – ✓",
    "!history! 'and' \"both\" $'ansi\\n'",
]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    folder = tmp_path / "a dir'with $signs"
    folder.mkdir()
    return Stage(folder)


# ---- what it says


def rendered(name: str) -> str:
    options, job = SCRIPTS[name]
    options = {**options}
    if "container" in options:
        runtime = options["container"]["runtime"]
        options["container"] = {**options["container"], "runtime": _runtime(runtime)}
    return render(make_job(**job), make_config(**options), PYTHON)


def _runtime(name: str) -> Any:
    from pipeline.cluster.options import ContainerRuntime

    return ContainerRuntime[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_the_one_that_was_read_and_approved(name: str) -> None:
    assert rendered(name) == (GOLDEN / name).read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(rendered(name))
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_output_on_the_host_is_where_the_mount_has_it() -> None:
    script = rendered("pyxis.sh")
    assert "output=/lustre/models/Ultra-NVFP4\n" in script  # touched by the script
    assert "launch.status /models/Ultra-NVFP4" in script  # read in the container


def test_one_process_has_no_ranks() -> None:
    with pytest.raises(ConfigError, match="verify is one process"):
        render(make_job(name=JobName.verify, output=None), make_config(nodes=2), PYTHON)


@pytest.mark.parametrize("logs", ['a"b', "a\\b", "a\nb"])
def test_a_log_that_slurm_would_misread_is_refused(logs: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.logs"):
        render(make_job(directory=Path("/data") / logs), make_config(), PYTHON)


# ---- what it does


def test_every_value_comes_out_as_it_went_in(stage: Stage) -> None:
    stage.verdict = 0
    environment = {"A": TORTURE[4], "B": TORTURE[5]}
    stage.srun = 'printf "%s\\0" "$A" "$B" "$PWD" >> "$here/seen.calls"'
    status, output = stage.run(make_config(environment=environment), *TORTURE)
    assert status == 0, output
    words = stage.calls("srun")
    assert words[words.index("launch.calibrate") + 1 :] == TORTURE
    assert stage.calls("seen") == [TORTURE[4], TORTURE[5], str(stage.folder)]
    assert stage.calls("python")[:3] == ["-m", "launch.status", str(stage.folder / "out")]
    assert "last words" in output


def test_ranks_meet_at_a_port_of_the_jobs_own(stage: Stage) -> None:
    stage.run(make_config(nodes=2, gpus_per_node=8))
    words = stage.calls("srun")
    (endpoint,) = (word for word in words if word.startswith("--rdzv-endpoint"))
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert endpoint == f"--rdzv-endpoint={host}:25678"
    for word in ("--nodes=2", "--nnodes=2", "--nproc-per-node=8", "--rdzv-id=12345678"):
        assert word in words
    assert "--max-restarts=0" in words


@pytest.mark.parametrize(
    ("verdict", "options", "restarts", "queue", "stop_file", "is_queued_again"),
    [
        (75, {}, 0, "RUNNING None", False, True),
        (75, {}, 2, "RUNNING None", False, True),
        (75, {}, 3, "RUNNING None", False, False),  # often enough
        (75, {"max_restarts": 0}, 0, "RUNNING None", False, False),
        (75, {}, 0, "RUNNING None", True, False),  # someone made the file stop
        (75, {}, 0, "COMPLETING None", False, False),  # scancel
        (75, {}, 0, "COMPLETING TimeLimit", False, True),
        (0, {}, 0, "RUNNING None", False, False),
        (1, {}, 0, "RUNNING None", False, False),
        (2, {}, 0, "RUNNING None", False, False),
        (4, {}, 0, "RUNNING None", False, False),
        (4, {"restart_after_crash": True}, 0, "RUNNING None", False, True),
        (4, {"restart_after_crash": True}, 3, "RUNNING None", False, False),
        (2, {"restart_after_crash": True}, 0, "RUNNING None", False, False),
        (127, {"restart_after_crash": True}, 0, "RUNNING None", False, False),
    ],
)
def test_what_is_queued_again(
    stage: Stage,
    verdict: int,
    options: dict[str, Any],
    restarts: int,
    queue: str,
    stop_file: bool,
    is_queued_again: bool,
) -> None:
    stage.verdict, stage.queue = verdict, queue
    stage.variables["SLURM_RESTART_COUNT"] = str(restarts)
    stage.work.mkdir()
    if stop_file:
        stage.srun = 'touch "$here/out.partial/stop"; exit 1'
    status, output = stage.run(make_config(**options))
    assert status == verdict, output
    asked = stage.calls("scontrol")
    assert asked == (["requeue", "12345678"] if is_queued_again else [])
    assert ("queued again: it goes on" in output) == is_queued_again


def test_a_job_that_slurm_itself_queues_again_for_ever_ends(stage: Stage) -> None:
    stage.variables["SLURM_RESTART_COUNT"] = "4"
    status, output = stage.run()
    assert (status, stage.calls("srun")) == (75, [])
    assert "more restarts than cluster.max_restarts=3" in output


def test_a_job_of_which_nothing_is_kept_exits_as_it_did(stage: Stage) -> None:
    stage.srun = "exit 7"
    status, _ = stage.run(None, "DIR", name=JobName.evaluate, output=None)
    assert (status, stage.calls("python"), stage.calls("scontrol")) == (7, [], [])


def test_usr1_asks_again_until_the_run_has_seen_it(stage: Stage) -> None:
    """The signal comes first, then the work directory, then an attempt that removes the file."""
    stage.srun = """
work="$here/out.partial"
wait_for() { until [ -e "$1" ]; do sleep; done; }
touch "$work.started"
for pause in {1..10}; do sleep; done
mkdir "$work"; wait_for "$work/stop"; rm "$work/stop"; wait_for "$work/stop"; exit 1"""
    output = _interrupt(stage, signal.SIGUSR1)
    assert "USR1: stopping after the layer in hand" in output
    assert stage.calls("scontrol") == ["requeue", "12345678"]


def test_term_leaves_time_for_the_last_words(stage: Stage) -> None:
    stage.srun = """
touch "$here/out.partial.started"
mkdir "$here/out.partial"
for pause in {1..10}; do sleep; done
exit 1"""
    stage.queue = "COMPLETING None"
    output = _interrupt(stage, signal.SIGTERM)
    assert "TERM: ending at once" in output
    assert "last words" in output
    assert not (stage.work / "stop").exists()
    assert stage.calls("scontrol") == []


def _interrupt(stage: Stage, number: signal.Signals) -> str:
    process = stage.start(render(stage.job("x=1"), make_config(), str(stage.python)))
    started = stage.work.with_name("out.partial.started")
    end = time.monotonic() + 20
    while not started.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    return output
