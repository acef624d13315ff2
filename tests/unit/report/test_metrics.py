"""metrics.jsonl: one line per call, readable at once, appended to after a kill."""

import json
import math

from pipeline.report.metrics import MetricsWriter, read_metrics


def test_lines_can_be_read_while_the_file_is_open(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write(stage="sweep", layer=0, tokens_per_s=12.5)
        metrics.write(stage="sweep", layer=1, tokens_per_s=math.inf)
        rows = read_metrics(path)
    assert [row["layer"] for row in rows] == [0, 1]
    assert rows[0]["tokens_per_s"] == 12.5
    assert rows[1]["tokens_per_s"] is None
    assert rows[0]["time"] > 1.7e9


def test_restart_appends_after_an_unfinished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"layer": 0}\n{"layer": 1, "tok')
    with MetricsWriter(path) as metrics:
        metrics.write(layer=1)
    with MetricsWriter(path) as metrics:
        metrics.write(layer=2)
    assert [row["layer"] for row in read_metrics(path)] == [0, 1, 2]
    assert json.loads(path.read_text().splitlines()[-1])["layer"] == 2
