"""The wheel works away from the repository: commands, conf/ and the demo model travel with it."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "launch", "conf")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds from a copy: setuptools leaves build/ and egg-info where it works."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__", "local")
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    _run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", target, source, cwd=source
    )
    (built,) = target.glob("layersweep-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel and sees this one's packages, but not the sources.

    A path in a .pth file is only searched: .pth files that lie there (an editable install's, which
    would lead back to the repository) are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    _run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps"),
        *("--no-index", wheel),
        cwd=home,
    )
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "seen.pth").write_text("\n".join(site.getsitepackages()))
    return home


def test_wheel_holds_every_preset_and_the_demo_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path for path in (ROOT / "conf").rglob("*.yaml") if "local" not in path.parts}
    expected |= {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    expected |= {path for path in (ROOT / "pipeline/demo/model").iterdir() if path.is_file()}
    expected |= {ROOT / "pipeline/cluster/slurm.sh.jinja", ROOT / "pipeline/report/template.html"}
    missing = {path.relative_to(ROOT).as_posix() for path in expected} - names
    assert not missing
    assert not any(name.startswith(("tests/", "bench/")) for name in names)


def test_calibrate_runs_from_any_directory(installed: Path, tmp_path: Path) -> None:
    assert (installed / "bin" / "layersweep-verify").is_file()
    output = _run(installed / "bin" / "layersweep-calibrate", "--help", cwd=tmp_path)
    assert "checkpoint: ???" in output
    assert list(tmp_path.iterdir()) == []


def test_plan_of_the_demo_model_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "layersweep-plan"
    values = json.loads(
        _run(command, "model=demo", "recipe=nvfp4_max", "output=json", cwd=tmp_path)
    )
    assert values["refusals"] == []
    assert values["quantized_gb"] < values["bf16_gb"]
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_submitted_and_looked_at_away_from_the_repository(
    installed: Path, tmp_path: Path
) -> None:
    words = ("dry_run=true", "experiment=demo", "output=out")
    script = _run(installed / "bin" / "layersweep-submit", *words, cwd=tmp_path)
    assert script.startswith("#!/bin/bash\n")
    assert f"{installed}/bin/python -m launch.status {tmp_path}/out" in script
    _run(installed / "bin" / "layersweep-status", tmp_path / "out", cwd=tmp_path, status=2)
    assert list(tmp_path.iterdir()) == []


def test_presets_are_found_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    words = ("model=demo", "recipe=no_such_name")
    output = _run(installed / "bin" / "layersweep-plan", *words, cwd=tmp_path, status=2)
    presets = [path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")]
    assert presets
    assert [name for name in presets if name not in output] == []


def test_imports_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import conf, launch, pipeline; print(conf.__file__, launch.__file__, pipeline.__file__)"
    for origin in _run(installed / "bin" / "python", "-c", code, cwd=tmp_path).split():
        assert Path(origin).is_relative_to(installed)


def _run(*command: object, cwd: Path, status: int = 0) -> str:
    """Runs a command with nothing of the repository on its path; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stderr if status else done.stdout
