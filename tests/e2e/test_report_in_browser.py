"""The report's page in a real browser: it renders, light, dark and on paper, and loads nothing.

A headless Chromium draws pages of 9 and of 108 layers. A script put into a copy of the page
measures what the browser made of it; the picture itself is taken of the page as it was written.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report.html import write_html
from tests.unit.report.sample import sample_report

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
WIDTH, HEIGHT = 1280, 900
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--v=0",
)
DARK = "--blink-settings=preferredColorScheme=0"
FAULT = re.compile(r"net::ERR_|Failed to load|violates the following|CONSOLE|Uncaught")

LISTEN = """<script>
const faults = [];
addEventListener("securitypolicyviolation", event => faults.push(event.blockedURI));
addEventListener("error", event => faults.push(String(event.target.src || event.message)), true);
</script>"""
MEASURE = """<script>
addEventListener("load", () => {
  const box = selector => {
    const found = document.querySelector(selector);
    if (!found) return null;
    const r = found.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom].map(Math.round);
  };
  const overlaps = [];
  for (const figure of document.querySelectorAll("figure")) {
    const labels = [...figure.querySelectorAll("text")].map(
      text => [text.textContent.trim(), text.getBoundingClientRect()]);
    labels.forEach(([a, p], i) => labels.slice(i + 1).forEach(([b, q]) => {
      const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (width > 1 && height > 3) overlaps.push(a + " | " + b);
    }));
  }
  document.title = JSON.stringify({
    faults, overlaps,
    resources: performance.getEntriesByType("resource").map(entry => entry.name),
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    boxes: {verdict: box(".verdict"), sizes: box(".first dl"), modes: box("#modes"),
            depth: box(".depth figure"), layers: box("#layers + table")},
    words: Math.min(...[...document.querySelectorAll("text")].map(
      text => text.getBoundingClientRect().height)),
  });
});
</script>"""


@dataclass
class Page:
    """A written page; the browser keeps its profile beside it."""

    path: Path

    def browse(self, path: Path, *options: str) -> tuple[str, list[str]]:
        """Runs the browser on a file; returns what it printed, and the faults that it logged."""
        command = [str(BROWSER), *OPTIONS, f"--user-data-dir={self.path.parent / 'profile'}"]
        done = subprocess.run(
            [*command, *options, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, [line for line in done.stderr.splitlines() if FAULT.search(line)]

    def shoot(self, *options: str) -> np.ndarray:
        """Returns the first screen as colours [height, width, 3]."""
        picture = self.path.with_suffix(".png")
        size = f"--window-size={WIDTH},{HEIGHT}"
        _, faults = self.browse(self.path, f"--screenshot={picture}", size, *options)
        assert faults == []
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int16)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        return pixels

    def measure(self, width: int = WIDTH, extra: str = "") -> dict[str, Any]:
        """Returns what a script finds in a copy of the page, whose policy lets that script run."""
        text = self.path.read_text(encoding="utf-8")
        policy = "default-src 'none'; "
        assert policy in text
        text = text.replace(policy, policy + "script-src 'unsafe-inline'; ", 1)
        text = text.replace("<title>", LISTEN + "<title>", 1)
        text = text.replace("</body>", extra + MEASURE + "</body>", 1)
        copy = self.path.with_name("measured.html")
        copy.write_text(text, encoding="utf-8")
        dom, log = self.browse(copy, "--dump-dom", f"--window-size={width},{HEIGHT}")
        title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
        assert title is not None
        return {**json.loads(html.unescape(title[1])), "log": log}


@pytest.fixture(scope="module", params=[9, 108], ids="{} layers".format)
def page(request, tmp_path_factory) -> Page:
    if BROWSER is None:
        pytest.skip("no chromium on PATH")
    path = tmp_path_factory.mktemp("page") / "report.html"
    report = sample_report(request.param)
    if request.param == 108:  # the fullest first screen
        report.evaluation.rejected = ["W4A4 mean KL 0.0123 is above max_kl=0.01"]
        report.evaluation.modes[0].clipped = 0.0031
        report.warnings += [f"layer {n}: 2 of 64 experts saw no token: 1, 2" for n in range(6)]
    write_html(report, path)
    return Page(path)


@pytest.fixture(scope="module")
def measured(page) -> dict[str, Any]:
    return page.measure()


def saturated(pixels: np.ndarray) -> int:
    """Pixels that are a colour rather than a shade of grey."""
    return int((pixels.max(-1) - pixels.min(-1) > 60).sum())


def colours(pixels: np.ndarray) -> int:
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.mark.parametrize(
    ("options", "ground"), [((), (255, 255, 255)), ((DARK,), (20, 24, 28))], ids=["light", "dark"]
)
def test_first_screen_shows_verdict_and_plot(page, measured, options, ground):
    boxes = measured["boxes"]
    pixels = page.shoot(*options)
    assert tuple(pixels[5, 5]) == ground
    for name, least in (("verdict", 20), ("sizes", 10), ("modes", 10), ("depth", 50)):
        left, top, right, bottom = boxes[name]
        assert 0 <= left < right <= WIDTH, name
        assert 0 < top < bottom <= HEIGHT, name
        assert colours(pixels[top:bottom, left:right]) > least, name
    left, top, right, bottom = boxes["depth"]
    assert saturated(pixels[top:bottom, left:right]) > 500
    # Text stands out: the verdict has pixels near the text's colour, far from the ground.
    left, top, right, bottom = boxes["verdict"]
    distance = np.abs(pixels[top:bottom, left:right] - np.array(ground)).max(-1)
    assert (distance > 150).sum() > 300


@pytest.mark.parametrize("width", [WIDTH, 600])
def test_nothing_is_loaded_nothing_overflows_no_labels_collide(page, measured, width):
    found = measured if width == WIDTH else page.measure(width)
    assert found["log"] == []
    assert found["resources"] == []
    assert found["faults"] == []
    assert found["width"] <= found["window"]
    assert found["overlaps"] == []
    if width == WIDTH:
        assert found["words"] >= 11  # pixels: the smallest label of a drawing


def test_a_page_that_loads_or_overflows_is_found(page):
    wide = '<div style="width: 3000px">x</div><img src="https://example.org/a.png">'
    found = page.measure(extra=wide + "<figure><svg><text y='9'>a</text><text y='9'>b</text></svg>")
    assert found["width"] >= 3000
    assert any("example.org" in fault for fault in found["faults"])
    assert any("example.org" in line for line in found["log"])
    assert "a | b" in found["overlaps"]


def test_prints_to_pages(page):
    pdf = page.path.with_suffix(".pdf")
    _, faults = page.browse(page.path, f"--print-to-pdf={pdf}", DARK)
    assert faults == []
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 9
