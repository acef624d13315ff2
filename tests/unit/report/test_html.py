"""The page: well-formed, self-contained, escaped, complete; and the drawings in it."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from pipeline.report.html import render_html, write_html
from pipeline.report.plots import draw_all
from pipeline.report.records import ExpertCoverage
from tests.unit.report.sample import sample_report

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = '<script>alert("x")</script> & $\\frac{1}{2}$ "quoted"'


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def page(report):
    report.warnings = ["read this"]
    report.unmatched_patterns = ["*vision*"]
    return Page(render_html(report))


def test_values_are_there_and_the_verdict_comes_first(page):
    body = page.text.partition("tiny-nvfp4 Passed the audit: 873.8 kB")
    assert body[1]
    for expected in (
        "read this",
        "routed experts NVFP4 4-over-6 64 320,000 180.0 kB 9.00 -19.0 % 45.02 0.20",
        "Mamba in FP8 max 1 40,000 40.00 kB 2.65 - - -",
        "embedding BF16 1 32,768 65.54 kB",
        "Calibrated on 4,096 tokens",
        "1.2345 nats per token",
        "1 saw no token: layer 3 expert 15",
        "backbone.layers.3.mixer.experts.3.up_proj.weight",
        "sweep 1 min 05 s 97.0",
        "tensors 1,234",
        "problems none",
        "*vision*",
        "torch 2.13.0",
    ):
        assert expected in body[2], expected


def test_nothing_is_loaded_from_elsewhere(page):
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}:
            assert value.startswith(("#", "data:image/png;base64,"))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    style = page.text
    assert "@import" not in style
    assert re.findall(r"url\((?!#)", style) == []
    assert all("http" not in (v or "") or n.startswith("xmlns") for n, v in page.attributes)


def test_an_evaluation_comes_first_and_is_complete():
    report = sample_report(108)
    evaluation = report.evaluation
    evaluation.modes[1].clipped = 0.0021
    errors = [100 * error for error in evaluation.layers[3].alone.values()]
    page = Page(render_html(report))
    before, _, after = page.text.partition("What became of the weights")
    for expected in (
        "hybrid-550b-nvfp4 W4A4 keeps 98.9 % of the top-1 tokens, KL 0.0123 nats, perplexity 5.313 "
        "against 5.254 (+1.1 %). Passed the audit: 1,118 GB",
        "W4A16 clips 0.21 % of the quantized inputs",
        "W4A4 (Blackwell) W4A16 (Hopper) perplexity (BF16: 5.254) 5.313 5.289",
        "clipped inputs, % 0.021 0.210",
        "on 8 x 8,192 tokens: held-out sequences",
        "48 layers x 64, 1 saw no token: layer 107 expert 3",
        "Arithmetic: products in BF16",
        "Error by depth",
        "accumulated (%)",
        f"layer type W4A4 % W4A16 % 3 MoE {errors[0]:.2f} {errors[1]:.2f}",
        "Which layer hurts",
        f"And {len(evaluation.groups) - 15} groups that add less, in run.json.",
    ):
        assert expected in before, expected
    assert before.count(evaluation.groups[0].pattern) == 2
    assert before.count(evaluation.groups[14].pattern) == 1
    assert evaluation.groups[15].pattern not in page.text
    assert "Evaluation took 2 min 40 s" in after
    assert "was not measured" not in page.text


def test_gates_and_groups_show_only_where_they_are():
    report = sample_report()
    report.evaluation.groups = []
    page = Page(render_html(report))
    assert "Which layer hurts" not in page.text
    assert "Rejected" not in page.text
    assert ("class", "verdict good") in page.attributes
    report.evaluation.rejected = ["KL too <high>", "top-1 too low"]
    page = Page(render_html(report))
    assert "(+1.1 %). Rejected: KL too <high>; top-1 too low. Passed the audit" in page.text
    assert ("class", "verdict bad") in page.attributes
    report.audit["passed"] = False
    page = Page(render_html(report))
    assert page.text.index("FAILED the audit") < page.text.index("W4A4 keeps")


def test_evaluation_that_is_not_finite_or_lacks_a_mode():
    report = sample_report()
    evaluation = report.evaluation
    evaluation.perplexity = evaluation.modes[0].perplexity = evaluation.modes[0].kl_p99 = math.nan
    evaluation.layers[2].alone["w4a4"] = math.inf
    del evaluation.layers[4].accumulated["w4a16"]
    evaluation.groups[0].kl_mean = evaluation.groups[1].extra_bits_bf16 = math.nan
    page = Page(render_html(report))
    assert "perplexity not finite against not finite (-)" in page.text
    assert not re.search(r"\bnan\b|\binf\b", page.text)
    assert "layer type W4A4 % W4A16 % 2 Mamba - 1.02" in page.text
    evaluation.modes, evaluation.layers, evaluation.groups = [], [], []
    assert "depth" not in [plot.name for plot in draw_all(report)]
    assert "No serving mode was measured" in Page(render_html(report)).text


def test_hostile_names_are_escaped(report):
    evaluation = sample_report().evaluation
    report.evaluation = evaluation
    evaluation.data = evaluation.arithmetic = evaluation.modes[0].mode = HOSTILE
    evaluation.rejected = [HOSTILE]
    for item in (*evaluation.groups, *evaluation.layers):
        item.layer_type = HOSTILE
    for group in evaluation.groups:
        group.group = group.pattern = group.format = HOSTILE
    report.output = f"/results/{HOSTILE}"
    report.warnings = [HOSTILE]
    report.recipe = report.source = report.hardware = HOSTILE
    report.unmatched_patterns = [HOSTILE]
    report.versions = {HOSTILE: HOSTILE}
    report.audit["problems"] = [HOSTILE, {HOSTILE: 1}]
    report.phases[HOSTILE] = 1.0
    for layer in report.layers:
        layer.seconds = {HOSTILE: 1.0}
        for kind in layer.kinds:
            kind.role = kind.worst_tensor = kind.format = kind.method = HOSTILE
            kind.input_amax = {HOSTILE: 1.0}
    html = render_html(report)
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert HOSTILE in page.text


def test_weight_only_run(weight_only_report):
    plots = [plot.name for plot in draw_all(weight_only_report)]
    assert plots == ["error", "m4", "time"]
    page = Page(render_html(weight_only_report))
    assert "Calibrated no (no forward pass)" in page.text
    assert "nats per token" not in page.text
    assert "Expert token coverage" not in page.text


def test_run_without_anything_optional(weight_only_report):
    report = weight_only_report
    report.phases, report.audit, report.versions, report.layout = {}, {}, {}, {}
    for layer in report.layers:
        layer.seconds = {}
        layer.kinds = [kind for kind in layer.kinds if kind.format == "bf16"]
    assert draw_all(report) == []
    page = Page(render_html(report))
    assert "Not audited: 873.8 kB of BF16 became 373.8 kB, 6.84 bits per parameter." in page.text
    assert page.text.count("was not measured: evaluation.num_sequences=8") == 1


def test_drawings_are_xml_with_labels_units_and_ids_of_their_own(report):
    plots = draw_all(report)
    assert [plot.name for plot in plots] == ["error", "m4", "coverage", "amax", "time"]
    ids = []
    for plot in plots:
        root = ElementTree.fromstring(plot.svg)
        assert root.get("viewBox")
        assert root.get("width") is None
        ids += [e.get("id") for e in root.iter() if e.get("id")]
        texts = [text for e in root.iter() if e.tag.endswith("text") for text in e.itertext()]
        assert any("layer" in text for text in texts)
        assert "currentColor" in plot.svg
        assert "#01020" not in plot.svg
    assert len(ids) == len(set(ids))
    for expected, plot in zip(
        ["relative error (%)", "M=4 blocks (%)", "tokens / mean of the layer",
         "routed experts: down_proj", "time (s)"], plots, strict=True,
    ):  # fmt: skip
        assert expected in plot.svg


def test_drawings_are_the_same_each_time(report):
    assert draw_all(report) == draw_all(report)


def test_coverage_of_the_largest_model_stays_small(report):
    report.coverage = [
        ExpertCoverage(layer=2 * n, tokens_per_expert=[e * n for e in range(512)])
        for n in range(1, 49)
    ]
    svg = next(plot.svg for plot in draw_all(report) if plot.name == "coverage")
    assert len(svg) < 200_000


def test_written_in_one_step(report, tmp_path):
    path = tmp_path / "report.html"
    write_html(report, path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
