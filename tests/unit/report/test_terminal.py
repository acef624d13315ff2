"""The final table: everything there, at 80 columns, without colour codes in a pipe."""

import io
from pathlib import Path

from rich.console import Console

from pipeline.report.terminal import print_report
from tests.unit.report.sample import sample_report


def render(report, files=None, **options) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=80, highlight=False, **options), files)
    return stream.getvalue()


def test_everything_is_said_in_80_columns(report):
    report.warnings = ["something to read"]
    report.unmatched_patterns = ["*vision*"]
    text = render(report, {"report": Path("/results/tiny-nvfp4/report.html")})
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for expected in (
        "Passed the audit",
        "routed experts NVFP4 4-over-6 64 180.0 kB 9.00 -19.0 % 45.0 0.20",
        "Mamba in FP8 max 1 40.00 kB 2.65 - - -",
        "copied as it is BF16 6 153.8 kB - - - -",
        "total 71 373.8 kB 7.51 -19.0 % 45.0 0.20",
        "as planned to the byte",
        "1.2345 nats per token",
        "1 saw no token: layer 3 expert 15",
        "10.30 % backbone.layers.3.mixer.experts.3.up_proj.weight",
        "sweep 1 min 05 s 97 %",
        "waiting for the source 0.4 s",
        "world 2, tp 1, ep 2",
        "2.50 GB at most",
        "unmatched *vision*",
        "output /results/tiny-nvfp4",
        "report /results/tiny-nvfp4/report.html",
        "warning something to read",
    ):
        assert expected in words, expected


def test_an_evaluation_follows_the_table_in_80_columns():
    report = sample_report(108)
    evaluation = report.evaluation
    evaluation.rejected = ["W4A4 mean KL 0.0123 is above max_kl=0.01"]
    evaluation.modes[0].clipped = 0.0021
    errors = [100 * error for error in evaluation.layers[3].alone.values()]
    text = render(report)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    _, table, block = words.partition("flushed: % of blocks that Hopper zeroes.")
    assert table
    for expected in (
        "W4A4 keeps 98.9 % of the top-1 tokens, KL 0.0123 nats, perplexity 5.313 against 5.254",
        "Rejected: W4A4 mean KL 0.0123 is above max_kl=0.01.",
        "W4A4 (Blackwell) W4A16 (Hopper)",
        "perplexity against BF16 +1.1 % +0.7 %",
        "evaluated 8 x 8,192 tokens: held-out sequences of the calibration data",
        f"layers layer 3 MoE: {errors[0]:.2f} / {errors[1]:.2f} % alone layer ",
        f"try layer {evaluation.groups[0].layer}, ",
        "warning W4A4 clips 0.21 % of the quantized inputs",
    ):
        assert expected in block, expected


def test_paths_are_never_broken_and_names_are_no_markup(report):
    report.output = "/" + "x" * 120
    report.warnings = ["[bold]not markup[/bold] [/]"]
    text = render(report)
    assert report.output in text
    assert "[bold]not markup[/bold] [/]" in text


def test_colour_only_on_a_terminal(report):
    assert "\x1b[1;32m" in render(report, force_terminal=True, color_system="standard")
    report.audit["passed"] = False
    assert "\x1b[1;31m" in render(report, force_terminal=True, color_system="standard")


def test_weight_only_run_has_no_lines_about_a_forward(weight_only_report):
    text = render(weight_only_report)
    for absent in ("loss", "experts  ", "memory", "forward", "unmatched", "warning"):
        assert f"\n{absent}" not in text
    assert "routed experts" in text


def test_many_warnings_are_cut(report):
    report.warnings = [f"warning number {n}" for n in range(50)]
    text = render(report)
    assert "warning number 19" in text
    assert "warning number 20" not in text
    assert "and 30 more, in run.json" in text
