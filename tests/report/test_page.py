"""report/page.py: pages that need nothing but themselves, in which text stays text; looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffusion_distill.report import image_grid, page
from diffusion_distill.report.chart import MOST_POINTS
from diffusion_distill.report.lines import Line, Panel

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='alert(3)' </style></title>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, content: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def everything(folder: Path) -> list[page.Part]:
    """Every part, with text that would be markup."""
    picture = image_grid({"": np.zeros((2, 8, 8, 1), np.float32)}, folder / "picture.png")
    curve = np.linspace(1, 2, 3000) ** 2
    rows = [{"name": HOSTILE, "nfe": 10, HOSTILE: 0.5}, {"name": "b", "nfe": 9, HOSTILE: None}, {"name": "c", "nfe": 2}]
    return [
        page.Heading(HOSTILE),
        page.Text(f"{HOSTILE}\n\nsecond"),
        page.Commands({HOSTILE: HOSTILE}),
        page.Picture(picture, HOSTILE),
        page.Chart(HOSTILE, Panel({HOSTILE: Line(np.arange(3000), curve)}, "x", HOSTILE)),
        page.Table(rows, caption=HOSTILE),
        page.Folded(HOSTILE, {HOSTILE: [HOSTILE, *range(1000)]}),
        page.Beside([page.Text(HOSTILE)]),
    ]


@pytest.mark.fast
def test_text_stays_text_and_a_page_needs_nothing_else(tmp_path: Path) -> None:
    content = page.write_page(tmp_path / "a" / "page.html", HOSTILE, HOSTILE, everything(tmp_path)).read_text("utf-8")
    seen = Seen(content)
    names = [tag for tag, _ in seen.tags]
    assert names.count("script") == 1 and names.count("img") == 1 and not {"link", "iframe"} & set(names)
    assert not [key for _, attributes in seen.tags for key in attributes if key.startswith("on")]
    sources = [a["src"] or "" for _, a in seen.tags if "src" in a]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "url(" not in content and "@import" not in content
    assert seen.text.count(HOSTILE) >= 8  # it is shown as it was given
    [path] = [a for tag, a in seen.tags if tag == "path" and a.get("data-x")]
    assert 2 < len((path["data-x"] or "").split()) <= MOST_POINTS


@pytest.mark.fast
def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="no PNG"):
        page.page_html("", "", [page.Picture(tmp_path / "a.png")])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_and_sorts_it(tmp_path: Path) -> None:
    """No error is logged; a click sorts by numbers, not by text; the pointer shows a chart's values."""
    content = page.page_html("A page", "What you see.", everything(tmp_path))
    asked = """<script>addEventListener("load", () => {
      const order = () => Array.from(document.querySelectorAll("tbody tr"), (row) => row.cells[1].textContent);
      const heads = document.querySelectorAll("th button"), found = {before: order()};
      heads[1].click(); found.up = order(); heads[1].click(); found.down = order();
      found.wide = document.documentElement.scrollWidth > innerWidth;
      const said = {id: "found", textContent: JSON.stringify(found)};
      document.body.append(Object.assign(document.createElement("pre"), said));
    });</script>"""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')  # allows the page's own script only
    assert policy.search(content)
    place = tmp_path / "page.html"
    place.write_text(policy.sub("", content).replace("</body>", f"{asked}</body>"), encoding="utf-8")
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size=500,800 --dump-dom"
    )
    command = [str(CHROMIUM), *switches.split(), f"--user-data-dir={tmp_path / 'browser'}", place.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found and json.loads(found[1]) == {
        "before": ["10", "9", "2"],
        "up": ["2", "9", "10"],
        "down": ["10", "9", "2"],
        "wide": False,
    }
