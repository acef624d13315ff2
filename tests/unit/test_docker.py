"""The containers without Docker: lint, what is copied, each step on stand-ins, the entry point."""

import os
import re
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.dockerfiles import (
    IgnoreFile,
    Step,
    copy_steps,
    default_args,
    read_dockerfile,
    replay_copies,
    run_step,
)

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
DIGEST = "sha256:" + "0123456789abcdef" * 4
LAUNCHERS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "entry")
LAUNCHERS.remove("__init__")


@pytest.fixture(params=DOCKERFILES)
def steps(request: pytest.FixtureRequest) -> list[Step]:
    return read_dockerfile(ROOT / request.param)


def find_tool(name: str) -> str:
    """A linter beside Python or on the path; the test is skipped without it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command of a RUN as a build does."""
    return subprocess.run(
        ["/bin/sh", "-c", command],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def write_stub(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- lint


@pytest.mark.parametrize("path", DOCKERFILES)
def test_hadolint(path: str) -> None:
    command = [find_tool("hadolint"), "--no-color", ROOT / path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_shellcheck() -> None:
    command = [
        find_tool("shellcheck"),
        "--shell=sh",
        "--enable=all",
        "--exclude=SC2249,SC2250",
        ENTRYPOINT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_and_its_user_is_not_root(steps: list[Step]) -> None:
    """What matters most, without a linter."""
    assert [step.text for step in steps if step.name == "FROM"] == ["${BASE}"]
    assert "BASE" not in default_args(steps), "a digest is given, not invented"
    assert not any(step.name == "ADD" for step in steps)
    users = [step.text for step in steps if step.name == "USER"]
    assert users == ["${UID}:${GID}"]
    assert default_args(steps)["UID"] == default_args(steps)["GID"] == "1000"
    entry = [step.text for step in steps if step.name == "ENTRYPOINT"]
    assert entry == ['["/opt/layersweep/entrypoint.sh"]'], "the exec form: it gets the signals"
    labels = " ".join(step.text for step in steps if step.name == "LABEL")
    for label in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels


def test_every_argument_that_a_step_uses_is_declared(steps: list[Step]) -> None:
    known = {"HOME", "USER", "LOGNAME"}
    for step in steps:
        if step.name == "ARG":
            known.add(step.text.partition("=")[0])
        used = set(re.findall(r"\$\{(\w+)\}", step.text))
        assert used <= known, step


# --- the steps


@pytest.mark.parametrize(
    ("base", "allow", "passes"),
    [
        (f"nvcr.io/nvidia/pytorch:26.05-py3@{DIGEST}", "", True),
        (f"python@{DIGEST}", "", True),
        ("nvcr.io/nvidia/pytorch:26.05-py3", "", False),
        (f"python@{DIGEST[:-1]}", "", False),
        ("python@sha256:DIGEST", "", False),
        ("python:3.12-slim", "1", True),
    ],
)
def test_a_base_without_a_digest_is_refused(
    steps: list[Step], base: str, allow: str, passes: bool
) -> None:
    done = shell(run_step(steps, "names no digest"), BASE=base, ALLOW_TAG=allow)
    assert (done.returncode == 0) is passes, done.stderr
    assert passes or f"BASE={base} names no digest" in done.stderr


def test_the_user_may_have_an_id_that_the_base_uses(steps: list[Step], tmp_path: Path) -> None:
    for name in ("groupadd", "useradd", "install"):
        write_stub(tmp_path / "bin", name, f'echo {name} "$@" >> {tmp_path}/calls')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = shell(run_step(steps, "useradd"), PATH=path, UID="4711", GID="42")
    assert done.returncode == 0, done.stderr
    group, user, directories = (tmp_path / "calls").read_text().splitlines()
    assert group == "groupadd --non-unique --gid 42 layersweep"
    assert "--non-unique" in user
    assert "--uid 4711 --gid 42 " in user
    assert directories == "install -d -m 1777 /var/lib/layersweep /workspace"


def test_the_base_keeps_its_torch(tmp_path: Path) -> None:
    """The step that rewrites the constraints, with a pip that shows what it gets."""
    (tmp_path / "constraints.txt").write_text("numpy==2.5.5\ntorch==2.13.0\ntorchvision==1\n")
    (tmp_path / "build").mkdir()
    (tmp_path / "layersweep.egg-info").mkdir()
    rewritten = tmp_path / "rewritten.txt"
    write_stub(tmp_path / "bin", "python", 'test "$1" = -c && echo "torch==2.12.0a0+nv26.05"')
    write_stub(
        tmp_path / "bin",
        "pip",
        f'echo "$@" > calls\nenv | grep ^PIP_CONSTRAINT > pip.env\ncp {rewritten} seen.txt',
    )
    command = run_step(read_dockerfile(ROOT / "docker/Dockerfile"), "pip install")
    command = command.replace("/tmp/constraints.txt", str(rewritten))
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = shell(f"cd {tmp_path} && {command}", PATH=path, PIP_CONSTRAINT="/etc/pip/constraint.txt")
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen.txt").read_text().splitlines()
    assert seen == ["numpy==2.5.5", "torchvision==1", "torch==2.12.0a0+nv26.05"]
    assert (tmp_path / "calls").read_text() == f"install --no-cache-dir -c {rewritten} .\n"
    assert (tmp_path / "pip.env").read_text() == "PIP_CONSTRAINT=\n"
    assert not rewritten.exists()
    assert not (tmp_path / "build").exists()


def test_the_cpu_image_takes_torch_without_cuda_at_our_version(tmp_path: Path) -> None:
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "layersweep.egg-info").mkdir()
    write_stub(tmp_path / "bin", "pip", 'echo "$@" >> calls')
    steps = read_dockerfile(ROOT / "docker/Dockerfile.cpu")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    command = f"cd {tmp_path} && {run_step(steps, 'pip install')}"
    done = shell(command, PATH=path, **default_args(steps))
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    pin = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert first.endswith(f"--index-url https://download.pytorch.org/whl/cpu {pin[0]}")
    assert second == "install --no-cache-dir -c constraints.txt ."


# --- what is copied


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("pipeline/plan.py", False),
        ("pipeline/demo/model/config.json", False),
        ("pipeline/__pycache__/plan.cpython-312.pyc", True),
        ("launch/__pycache__/plan.py", True),
        ("conf/job/calibrate.yaml", False),
        ("conf/job/local/mine.yaml", True),
        ("docker/entrypoint.sh", False),
        ("docker/Dockerfile", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("tests/unit/test_docker.py", True),
        ("outputs/demo-nvfp4/config.json", True),
        ("README.md", False),
    ],
)
def test_dockerignore(path: str, hidden: bool) -> None:
    assert IgnoreFile(ROOT / ".dockerignore").hides(Path(path)) is hidden


def test_everything_that_is_copied_is_there(steps: list[Step]) -> None:
    sources = [source for group, _, _ in copy_steps(steps) for source in group]
    assert {"pipeline", "launch", "conf", "docker/entrypoint.sh"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.slow
def test_what_is_copied_installs_and_starts(tmp_path: Path) -> None:
    """`pip install .` from the copied files alone; packages of this environment are the base's."""
    opt, home = tmp_path / "opt", tmp_path / "environment"
    replay_copies(read_dockerfile(ROOT / DOCKERFILES[0]), ROOT, opt)
    assert os.access(opt / "entrypoint.sh", os.X_OK)
    assert not list(opt.rglob("__pycache__"))
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (packages,) = home.glob("lib/python*/site-packages")
    # A path in a .pth file is searched; .pth files that lie there (an editable install) are not.
    (packages / "seen.pth").write_text("\n".join(site.getsitepackages()))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq"]
    install += ["--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(install, cwd=opt, check=True, timeout=300)
    installed = {path.relative_to(packages).as_posix() for path in packages.rglob("*")}
    expected = {path for path in (ROOT / "conf").rglob("*.yaml") if "local" not in path.parts}
    expected |= {
        path for path in (ROOT / "pipeline" / "demo" / "model").iterdir() if path.is_file()
    }
    assert {path.relative_to(ROOT).as_posix() for path in expected} - installed == set()
    for launcher in LAUNCHERS:
        assert os.access(home / "bin" / f"layersweep-{launcher}", os.X_OK)
    environment = {
        "PATH": f"{home}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "LAYERSWEEP_BASE_ENTRYPOINT": "/nonexistent",
    }
    work = tmp_path / "workspace"
    work.mkdir()
    for words in (
        ["plan", "model=demo", "recipe=nvfp4_max", "output=json"],
        ["verify", "--help"],
    ):
        done = subprocess.run(
            [opt / "entrypoint.sh", *words],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert done.stdout.strip()
    assert list(work.iterdir()) == []


# --- the entry point


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Commands that show their name and arguments, one a line, and what they find."""
    show = 'echo "${0##*/}"; for word; do echo "$word"; done'
    for name in ("torchrun", "some-tool", *(f"layersweep-{name}" for name in LAUNCHERS)):
        write_stub(tmp_path / "bin", name, show)
    write_stub(tmp_path / "bin", "show-environment", "env; umask; echo pid=$$")
    return tmp_path / "bin"


def enter(stubs: Path, *words: str, status: int = 0, **environment: str) -> str:
    values = {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "HOME": str(stubs.parent),
        "LAYERSWEEP_BASE_ENTRYPOINT": "/nonexistent",
    }
    done = subprocess.run(
        ["/bin/sh", ENTRYPOINT, *words],
        env=values | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_by_their_short_names(launcher: str, stubs: Path) -> None:
    words = ["output='a b'", "data=[{path: x}]", ""]
    assert enter(stubs, launcher, *words).split("\n")[:-1] == [f"layersweep-{launcher}", *words]


@pytest.mark.parametrize(
    ("words", "started"),
    [
        ([], ["layersweep-calibrate", "--help"]),
        (["some-tool", "-x", "a b"], ["some-tool", "-x", "a b"]),
        (["torchrun", "--nnodes", "2"], ["torchrun", "--nnodes", "2"]),
        (["torchrun"], ["torchrun"]),
        (
            ["torchrun", "8", "evaluate", "DIR", "source=a b"],
            [
                *("torchrun", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "8"),
                *("-m", "launch.evaluate", "DIR", "source=a b"),
            ],
        ),
    ],
)
def test_what_is_started(words: list[str], started: list[str], stubs: Path) -> None:
    assert enter(stubs, *words).split("\n")[:-1] == started


def test_ranks_without_a_job(stubs: Path) -> None:
    assert "usage: torchrun RANKS calibrate" in enter(stubs, "torchrun", "8", status=2)


def test_a_command_that_fails_keeps_its_status(stubs: Path) -> None:
    write_stub(stubs, "layersweep-plan", "exit 75")
    enter(stubs, "plan", status=75)


def test_caches_lie_under_home_unless_they_are_named(stubs: Path) -> None:
    found = enter(stubs, "show-environment", MPLCONFIGDIR="/elsewhere").splitlines()
    home = stubs.parent
    assert f"HOME={home}" in found
    assert f"TRITON_CACHE_DIR={home}/.cache/triton" in found
    assert "MPLCONFIGDIR=/elsewhere" in found


@pytest.mark.parametrize("home", ["/nonexistent", ""])
def test_a_home_that_cannot_be_written(home: str, stubs: Path, tmp_path: Path) -> None:
    found = enter(stubs, "show-environment", HOME=home, TMPDIR=str(tmp_path)).splitlines()
    (made,) = [line for line in found if line.startswith("HOME=")]
    assert made.startswith(f"HOME={tmp_path}/layersweep-home-")
    assert os.stat(made.removeprefix("HOME=")).st_mode & 0o777 == 0o700


def test_the_process_is_replaced_with_its_umask_and_gets_signals(stubs: Path) -> None:
    write_stub(
        stubs, "layersweep-calibrate", "trap 'exit 75' TERM\necho $$ $(umask)\nsleep 60 & wait"
    )
    process = subprocess.Popen(
        ["/bin/sh", ENTRYPOINT, "calibrate"],
        env={"PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(stubs.parent)},
        stdout=subprocess.PIPE,
        text=True,
        umask=0o027,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().split() == [f"{process.pid}", "0027"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_the_bases_own_entry_point_runs_first_and_leaves_stdout_alone(
    stubs: Path, tmp_path: Path
) -> None:
    base = write_stub(
        tmp_path, "nvidia_entrypoint.sh", 'echo "== PyTorch =="; export COMPAT=yes; exec "$@"'
    )
    text = enter(stubs, "show-environment", LAYERSWEEP_BASE_ENTRYPOINT=str(base))
    assert "COMPAT=yes" in text.splitlines()
    assert "PyTorch" not in text
    words = ["plan", "a b", "output=json"]
    text = enter(stubs, *words, LAYERSWEEP_BASE_ENTRYPOINT=str(base))
    assert text == "layersweep-plan\na b\noutput=json\n"
    write_stub(stubs, "layersweep-plan", "exit 2")
    banner = enter(stubs, "plan", status=2, LAYERSWEEP_BASE_ENTRYPOINT=str(base))
    assert banner == "== PyTorch ==\n"


def test_it_runs_in_a_shell_without_extensions() -> None:
    for name in ("dash", "busybox"):
        if (found := shutil.which(name)) is not None:
            command = [found, *(["sh"] if name == "busybox" else []), "-n", str(ENTRYPOINT)]
            subprocess.run(command, check=True)
    begun = time.monotonic()
    subprocess.run(["/bin/sh", ENTRYPOINT, "true"], check=True)
    assert time.monotonic() - begun < 10
