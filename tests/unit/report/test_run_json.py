"""run.json: what is written is read back; other files are refused."""

import json
import math

import pytest

from pipeline.errors import OutputError
from pipeline.report.run_json import read_run_json, write_run_json
from tests.unit.report.sample import sample_report


def test_round_trip(report, weight_only_report, tmp_path):
    for number, run in enumerate((report, weight_only_report)):
        path = tmp_path / f"run{number}.json"
        write_run_json(run, path)
        assert read_run_json(path) == run
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run0.json", "run1.json"]


def test_scripts_find_a_summary(report, tmp_path):
    write_run_json(report, tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["schema"] == 1
    assert content["effective_bits"] == 6.84
    assert content["summary"]["verdict"].startswith("Passed the audit")
    assert content["summary"]["kinds"][0]["change_from_max"] == pytest.approx(-0.19)


def test_nan_is_written_as_null_and_read_as_nan(report, tmp_path):
    report.layers[0].kinds[0].squared_error = math.nan
    path = tmp_path / "run.json"
    write_run_json(report, path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert math.isnan(read_run_json(path).layers[0].kinds[0].squared_error)


def test_an_evaluation_makes_the_round_trip(tmp_path):
    report = sample_report()
    report.evaluation.modes[0].clipped = 0.02
    path = tmp_path / "run.json"
    write_run_json(report, path)
    assert read_run_json(path) == report
    content = json.loads(path.read_text())
    assert content["evaluation"]["modes"][0]["mode"] == "w4a4"
    assert content["evaluation"]["layers"][3]["alone"].keys() == {"w4a4", "w4a16"}
    assert len(content["evaluation"]["groups"]) == len(report.evaluation.groups)
    assert content["summary"]["fidelity"].startswith("W4A4 keeps 98.9 %")
    assert content["summary"]["warnings"][0].startswith("W4A4 clips 2.00 %")
    assert content["summary"]["warnings"][1:] == report.warnings


def test_an_evaluation_with_nan_is_json(tmp_path):
    report = sample_report()
    report.evaluation.layers[1].alone["w4a4"] = math.nan
    report.evaluation.groups[0].kl_mean = report.evaluation.modes[0].perplexity = math.inf
    path = tmp_path / "run.json"
    write_run_json(report, path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    back = read_run_json(path).evaluation
    assert math.isnan(back.layers[1].alone["w4a4"])
    assert math.isnan(back.groups[0].kl_mean)
    assert math.isnan(back.modes[0].perplexity)


def test_a_run_without_the_field_is_read(report, tmp_path):
    path = tmp_path / "run.json"
    write_run_json(report, path)
    content = json.loads(path.read_text())
    del content["evaluation"]
    path.write_text(json.dumps(content))
    assert read_run_json(path) == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "run.json is what a run wrote"),
        ('{"schema": 1}', "KeyError: 'layers'"),
        ('{"schema": 99}', "schema 99; this version reads schema 1"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OutputError, match=message):
        read_run_json(path)
