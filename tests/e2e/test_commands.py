"""The three commands as a user starts them: arguments, output, exit statuses, messages.

Starting an interpreter and importing Model Optimizer takes seconds, so most commands run in a fork
of this process, with its own arguments, directory, stdout and stderr; one of each kind is started
for real, under torchrun too.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest

import launch.calibrate
import launch.plan
import launch.verify  # noqa: F401  (imported before forking: once, not per command)
from launch.entry import CONF_DIR
from pipeline.recipe import load_recipe
from tests.e2e.harness import GOLDEN, GOLDEN_SIZE, read_checkpoint

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (CONF_DIR / "recipe").glob("*.yaml"))
SUPER = pytest.param("nemotron3_super", marks=pytest.mark.slow)
MODELS = ("demo", "nemotron3_nano", SUPER)
PLAN_KEYS = {"bf16_gb", "quantized_gb", "effective_bits", "per_rank", "refusals"}
GOLDEN_JOB = (
    "evaluation.num_sequences=0",
    f"checkpoint={GOLDEN / 'source'}",
    f"data={GOLDEN / 'calibration_ids.npy'}",
    *(f"calibration.{name}={value}" for name, value in GOLDEN_SIZE.items()),
    "device=cpu",
)

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module", autouse=True)
def _model_optimizer() -> None:
    load_recipe("nvfp4_four_over_six", CONF_DIR / "recipe")  # imports it before forking


def command(name: str, *arguments: object, cwd: Path | None = None) -> Done:
    """`python -m launch.NAME ARGUMENTS` in a fork of this process."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        child = os.fork()
        if child == 0:
            _become(name, words, out, err, cwd or Path(folder))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Done([name, *words], status, out.read_text(), err.read_text())


def _become(name: str, words: list[str], out: Path, err: Path, cwd: Path) -> None:
    """The rest of the life of a forked process."""
    status: Any = 99
    try:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(cwd)
        sys.argv = [f"launch/{name}.py", *words]
        importlib.import_module(f"launch.{name}").main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 98)


def start(*words: object, cwd: Path, timeout: float = 120.0) -> Done:
    """A real process of this interpreter, away from the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def torchrun(*arguments: object, cwd: Path) -> Done:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return start(*launcher, "-m", "launch.calibrate", *arguments, cwd=cwd)


def plan(*arguments: object) -> dict[str, Any]:
    done = command("plan", *arguments, "output=json")
    values = json.loads(done.stdout)  # and nothing but JSON
    assert isinstance(values, dict)
    assert done.returncode == (2 if values["refusals"] else 0), done.stderr
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model, calibrated by the command on one rank; its stdout lies beside it."""
    folder = tmp_path_factory.mktemp("made")
    done = command("calibrate", *GOLDEN_JOB, "output=here/out", "allow_bad_loss=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder / "here" / "out"


@pytest.mark.parametrize("model", MODELS)
def test_plan_of_a_known_model(model: str) -> None:
    values = plan(f"model={model}")
    assert set(values) >= PLAN_KEYS
    assert values["bf16_gb"] > values["quantized_gb"] > 0
    assert 4 < values["effective_bits"] < 16
    assert values["per_rank"]


def test_plan_of_ultra_has_the_published_figures() -> None:
    values = plan("model=nemotron3_ultra", "recipe=nvfp4_four_over_six", "parallel.world=8")
    assert set(values) >= PLAN_KEYS
    assert values["refusals"] == []
    assert round(values["bf16_gb"]) == 1121
    assert values["quantized_gb"] == pytest.approx(352.3, abs=0.05)
    assert values["effective_bits"] == pytest.approx(5.03, abs=0.005)
    assert len(values["per_rank"]) == 8 or values["layout"].startswith("world=8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_plan_of_the_golden_checkpoint_under_every_preset(recipe: str) -> None:
    values = plan(f"checkpoint={GOLDEN / 'source'}", f"recipe={recipe}")
    assert set(values) >= PLAN_KEYS
    assert values["refusals"] == []


def test_plan_as_a_table_names_groups_and_layout() -> None:
    done = command("plan", "model=nemotron3_nano", "parallel.world=2")
    assert done.returncode == 0, done.stderr
    for word in ("routed expert", "nvfp4", "bf16", "world=2", "bits per parameter"):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model=nemotron4",), "model: found nemotron4; must be one of demo, nemotron3_nano"),
        ((), "exactly one of them says what to plan"),
        (("model=demo", "checkpoint=demo"), "exactly one of them says what to plan"),
        (("model=demo", "recipe=nvfp5"), "nvfp5"),
        (("model=nemotron3_ultra", "parallel.tp=3", "parallel.world=4"), "tp"),
        (("checkpoint=/no/such/directory",), "/no/such/directory"),
        (("model=demo", "calibration.seq_len=1"), "must be at least 2"),
    ],
)
def test_plan_refuses_with_status_2(arguments: tuple[str, ...], message: str) -> None:
    done = command("plan", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_plan_refusal_as_json() -> None:
    done = command("plan", "model=nemotron3_nano", "parallel.tp=3", "output=json")
    assert done.returncode == 2
    (refusal, *_) = json.loads(done.stdout)["refusals"]
    assert "tp" in refusal


UNKNOWN = [
    ("calibrate", "calibration.wrong=1", "wrong"),
    ("calibrate", "parallel.tp=two", "Value 'two' of type 'str' could not be converted to Integer"),
    ("plan", "no_such_option=1", "no_such_option"),
    ("verify", "no_such_option=1", "no_such_option"),
]


@pytest.mark.parametrize(("name", "word", "message"), UNKNOWN)
def test_unknown_or_mistyped_override_is_named(
    name: str, word: str, message: str, tmp_path: Path
) -> None:
    done = command(name, word, cwd=tmp_path)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["calibrate", "plan", "verify"])
def test_unknown_override_is_refused_with_status_2(name: str) -> None:
    assert command(name, "no_such_option=1").returncode == 2  # 1: an audit found problems


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("calibrate", ("checkpoint:", "output:", "recipe:", "parallel:", "data:", "seq_len")),
        ("plan", ("model:", "checkpoint:", "recipe:", "output: table")),
        ("verify", ("directory:", "source:", "hopper:", "output: table")),
    ],
)
def test_help_shows_every_option_and_leaves_nothing(
    name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    done = command(name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [word for word in words if word not in done.stdout] == []
    assert not list(tmp_path.iterdir())


def test_calibrate_writes_what_was_planned(made: Path) -> None:
    planned = plan(f"checkpoint={GOLDEN / 'source'}")
    report = json.loads((made / "layersweep" / "run.json").read_text())
    written = sum(len(data) for _, _, data in read_checkpoint(made).values())
    assert report["quantized_bytes"] == planned["quantized_bytes"] == written
    assert report["predicted_bytes"] == written
    assert report["effective_bits"] == planned["effective_bits"]
    assert planned["quantized_gb"] == pytest.approx(written / 1e9)
    assert len(list(made.glob("*.safetensors"))) == planned["files"]


def test_calibrate_ends_with_a_table_and_the_paths(made: Path) -> None:
    stdout = (made.parents[1] / "stdout").read_text()
    for name in ("report.html", "run.json", "metrics.jsonl"):
        assert name in stdout.replace("\n", ""), name
        assert (made / "layersweep" / name).is_file()
    stderr = (made.parents[1] / "stderr").read_text()
    assert "layer 6" in stderr
    assert [p.name for p in made.parent.iterdir()] == ["out"]


def test_calibrate_refuses_what_is_missing(tmp_path: Path) -> None:
    done = command("calibrate", cwd=tmp_path)
    assert done.returncode == 2
    assert "checkpoint, output: found nothing; these options are mandatory" in done.stderr


def test_calibrate_refuses_a_worse_than_unigram_loss(tmp_path: Path) -> None:
    done = command("calibrate", *GOLDEN_JOB, f"output={tmp_path / 'out'}")
    assert done.returncode == 2, done.stderr
    assert "allow_bad_loss=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_verify_accepts_our_checkpoint(made: Path) -> None:
    done = command("verify", made.name, cwd=made.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "audit passed" in done.stdout
    done = command("verify", f"directory={made}", f"source={GOLDEN / 'source'}", "output=json")
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(done.stdout)
    assert values["ok"] is True
    assert values["directory"] == str(made)
    assert values["problems"] == []


@pytest.mark.parametrize("name", ["a b", "a=b", "a,b", "a(1)", "[a]"])
def test_verify_takes_a_directory_of_any_name(name: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(made)
    done = command("verify", f"./{name}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def _drop_scale(data: bytes) -> bytes:
    return data.replace(b".weight_scale_2", b".weight_scale_3", 1)


def _flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "found"),
    [(_drop_scale, "weight_scale_3"), (_flip_last, "SHA-256"), (lambda d: d[:-7], "bytes")],
    ids=["key", "bit", "truncated"],
)
def test_verify_finds_damage(damage: Any, found: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "bad")
    shard = next(
        p for p in sorted((tmp_path / "bad").glob("model-0*")) if b"scale_2" in p.read_bytes()
    )
    shard.write_bytes(damage(shard.read_bytes()))
    done = command("verify", tmp_path / "bad")
    assert done.returncode == 1, done.stdout + done.stderr
    assert found in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stderr
    done = command("verify", tmp_path / "bad", "output=json")
    assert done.returncode == 1
    values = json.loads(done.stdout)
    assert values["ok"] is False
    assert any(found in problem for problem in values["problems"])


@pytest.mark.parametrize("argument", ["nowhere", str(GOLDEN / "source" / "config.json"), ""])
def test_verify_refuses_what_is_no_directory(argument: str, tmp_path: Path) -> None:
    done = command("verify", *([argument] if argument else []), cwd=tmp_path)
    assert done.returncode == 2
    assert f"directory: found {argument or 'nothing'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_refuses_an_empty_directory(tmp_path: Path) -> None:
    done = command("verify", tmp_path)
    assert done.returncode in (1, 2)
    assert "config.json" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_command_started_for_real(tmp_path: Path) -> None:
    done = start("-m", "launch.verify", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("layersweep: error") == 1
    script = Path(sys.executable).with_name("layersweep-verify")
    assert script.is_file(), "install with: pip install -e ."
    console = subprocess.run([script, "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert console.returncode == 2
    assert "directory: found nowhere" in console.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes_as_one_rank(made: Path, tmp_path: Path) -> None:
    done = torchrun(*GOLDEN_JOB, "output=out", "allow_bad_loss=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = read_checkpoint(tmp_path / "out"), read_checkpoint(made)
    assert set(ours) == set(theirs)
    scalars = (".input_scale", ".k_scale", ".v_scale")
    assert not [n for n in ours if ours[n] != theirs[n] and not n.endswith(scalars)]
    assert done.stdout.count("run.json") == 1


@pytest.mark.slow
def test_an_error_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = torchrun("checkpoint=no-such-directory", "output=out", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("layersweep: error") == 1, done.stderr
    assert "no-such-directory" in done.stderr
    assert not list(tmp_path.iterdir())
