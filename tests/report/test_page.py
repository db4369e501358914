"""Pages stand alone: everything is in them, text is text, charts keep their peaks, and a browser sorts and shows."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_distill.report import (
    Beside,
    Chart,
    Commands,
    Folded,
    Heading,
    Line,
    Panel,
    Picture,
    Table,
    Text,
    write_page,
)
from diffusion_distill.report.chart import axis_of, short, thinned

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;"
VOID = {"meta", "img", "path"}
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=2000",
)  # fmt: skip


class Read(HTMLParser):
    """The elements of a page as (name, attributes), its text, and whether every element is closed in its place."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self._open = "", []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data

    def named(self, name: str, look: str | None = None) -> list[dict]:
        return [a for tag, a in self.elements if tag == name and (look is None or a.get("class") == look)]


def png(width: int, height: int) -> bytes:
    """A grey picture."""
    file = io.BytesIO()
    Image.new("L", (width, height), 128).save(file, format="PNG")
    return file.getvalue()


def hostile_parts() -> list:
    """Every part, with markup where text belongs."""
    panel = Panel({HOSTILE: Line([1, 2, 3], [1.0, 2.0, 1.5])}, HOSTILE, HOSTILE, marks={HOSTILE: 2})
    return [
        Heading(HOSTILE),
        Text(f"{HOSTILE}\n\nsecond"),
        Table([{HOSTILE: HOSTILE, "nfe": 1}], caption=HOSTILE),
        Picture(png(8, 8), HOSTILE),
        Chart(HOSTILE, panel),
        Beside([Text(HOSTILE), Chart("other", panel)]),
        Folded(HOSTILE, {HOSTILE: [HOSTILE, 1]}),
        Commands({HOSTILE: HOSTILE}),
    ]


@pytest.mark.fast
def test_hostile_text_stays_text_and_the_page_stands_alone(tmp_path: Path) -> None:
    text = write_page(tmp_path / "page.html", HOSTILE, HOSTILE, hostile_parts()).read_text(encoding="utf-8")
    page = Read(text)
    assert len(page.named("script")) == 1 and len(page.named("img")) == 1 and len(page.named("style")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 12
    assert [line["data-label"] for line in page.named("path", "line")] == [HOSTILE] * 2
    for tag, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes, tag
        assert "href" not in attributes and tag not in ("link", "iframe", "object", "base")
    rest = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", rest)
    [policy] = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert (
        policy.startswith("default-src 'none'; img-src data:;")
        and "'unsafe-inline'" not in policy.split("script-src")[1]
    )


@pytest.mark.fast
def test_tables_can_be_sorted_and_numbers_stand_at_the_right() -> None:
    page = Read(Table([{"name": "a", "fid": 0.123456789}, {"name": "b", "fid": None}], caption="two").html())
    assert [head["aria-sort"] for head in page.named("th")] == ["none", "none"] and len(page.named("button")) == 2
    assert [head.get("class") for head in page.named("th")] == [None, "number"]
    assert [cell.get("data-value") for cell in page.named("td", "number")] == ["0.123456789", None]
    with pytest.raises(ValueError, match="no rows"):
        Table([]).html()


@pytest.mark.fast
def test_pictures_are_in_the_page_whole_and_small_ones_enlarged(tmp_path: Path) -> None:
    for width, scale in ((8, 40), (160, 2), (900, 1)):
        [image] = Read(Picture(png(width, 10), "x").html()).named("img")
        assert (image["width"], image["height"]) == (str(scale * width), str(10 * scale))
        assert "class" not in image  # browsers then interpolate
        assert base64.b64decode(image["src"].partition(",")[2]) == png(width, 10)
    (tmp_path / "no.png").write_text("<html>not found")
    with pytest.raises(ValueError, match="no PNG, but an HTML page"):
        Picture(tmp_path / "no.png").html()


@pytest.mark.fast
def test_thinning_keeps_ends_peaks_and_gaps() -> None:
    x, y = np.arange(100_000.0), np.sin(np.arange(100_000.0) / 5e3)
    y[[41_234, 77_777]] = 50, -60
    y[20_000:30_000] = np.nan
    line = thinned(Line(x, y))
    xs, ys = np.asarray(line.x), np.asarray(line.y)
    assert 300 < len(xs) <= 500 and (np.diff(xs) > 0).all()
    assert (xs[0], xs[-1]) == (0, 99_999) and {41_234, 77_777} <= set(xs)
    assert np.isnan(ys[(xs > 20_500) & (xs < 29_500)]).all() and np.isnan(ys).any()
    np.testing.assert_array_equal(ys, y[xs.astype(int)])
    short_line = Line([1, 2], [3, 4])
    assert np.array_equal(thinned(short_line).y, [3, 4])


@pytest.mark.fast
def test_a_chart_stands_where_its_values_are() -> None:
    html = Chart("c", Panel({"a": Line([0, 5, 6, 10], [1, np.nan, 100, 10000])}, "x", "y", yscale="log")).html()
    [line] = Read(html).named("path", "line")
    points = np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", line["d"]), float)
    assert line["d"].count("M") == 2 and line["data-x"] == "0 6 10" and line["data-y"] == "1 100 1e+04"
    assert points[1, 1] == pytest.approx((points[0, 1] + points[2, 1]) / 2, abs=0.1)  # 100 is half way on a log axis
    assert points[2, 0] - points[0, 0] == pytest.approx(1000 / 1.06, abs=0.2)  # and 3% are spare at each end
    with pytest.raises(ValueError, match="no lines"):
        Chart("c", Panel({})).html()


@pytest.mark.fast
@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, 7.0], [0, 1e-9], [1e9, 3e9], [-1e4, -1.0, 0, 1, 1e4]])
@pytest.mark.parametrize("scale", ["linear", "auto", "asinh"])
def test_axes_hold_their_values_and_have_ticks(values: list[float], scale: str) -> None:
    axis = axis_of([np.array(values)], scale)
    places = axis.at(values)
    assert (places > 0).all() and (places < 1).all()
    assert 1 <= len(axis.ticks) <= 9 and all(-1e-9 <= axis.at(tick) <= 1 + 1e-9 for tick in axis.ticks)


@pytest.mark.fast
def test_numbers_at_ticks_are_short() -> None:
    assert [short(n) for n in (0, 0.003, 950, 20_000, 1_500_000, -2e9)] == ["0", "0.003", "950", "20k", "1.5M", "-2G"]


@pytest.mark.fast
def test_folded_settings_are_json_with_long_lists_cut_short() -> None:
    content = {"a": [1, 2.5, None, True], "levels": list(range(1025)), "deep": {"b": [{"c": "é"}], "empty": {}}}
    text = Read(Folded("run.json", content).html()).text.removeprefix("run.json")
    assert "… 1001 more" in text and '"é"' in text
    assert json.loads(text.replace(", … 1001 more", "")) == {**content, "levels": list(range(24))}


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser_headings_sort_and_charts_tell_their_values(tmp_path: Path) -> None:
    """A script in a copy, whose policy is taken away, does what a user does and writes down what it sees."""
    rows = [{"name": name, "fid": fid} for name, fid in (("b10", 2.0), ("b9", None), ("<i>", 10.0), ("a", 1.5))]
    lines = {HOSTILE: Line([0, 10, 20], [0.5, 0.25, 0.125]), "far": Line([18, 20], [1, 2])}
    parts = [*hostile_parts()[:3], Table(rows), Chart("losses", Panel(lines, "images", "loss"))]
    page = write_page(tmp_path / "page.html", "t", "w", parts)
    use = """<script>
      const seen = [], table = document.querySelectorAll("table")[1], heads = table.querySelectorAll("button");
      const column = () => Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent).join(" ");
      for (const [k, times] of [[1, 2], [0, 1]]) for (let i = 0; i < times; i++) {
        heads[k].click();
        seen.push(column() + " " + heads[k].parentNode.getAttribute("aria-sort"));
      }
      const plot = Array.from(document.querySelectorAll(".plot")).pop(), box = plot.getBoundingClientRect();
      const at = { clientX: box.left + box.width / 2, clientY: box.top + 9 };
      plot.dispatchEvent(new PointerEvent("pointermove", at));
      seen.push(Array.from(plot.querySelectorAll(".tip div"), (row) => row.textContent).join(" "));
      plot.dispatchEvent(new PointerEvent("pointerleave"));
      seen.push(plot.querySelectorAll(".tip").length, document.documentElement.scrollWidth <= innerWidth);
      document.title = JSON.stringify(seen);
    </script>"""
    text = page.read_text(encoding="utf-8")
    copy = tmp_path / "copy.html"
    copy.write_text(re.sub(r'<meta http-equiv="Content-Security[^>]*>', "", text).replace("</body>", f"{use}</body>"))
    dom, errors = browse(copy, tmp_path)
    title = re.search(r"<title>(.*?)</title>", dom)
    seen = json.loads(unescape(title[1])) if title else []
    assert seen[:3] == ["a b10 <i> b9 ascending", "<i> b10 a b9 descending", "<i> a b9 b10 ascending"]
    assert seen[3:] == [f"images 10 {HOSTILE}0.25", 0, True]
    assert "CONSOLE" not in errors
    dom, errors = browse(page, tmp_path)  # the page as it is: its policy lets its own script run
    assert "CONSOLE" not in errors and dom.count("<script") == 1


def browse(page: Path, tmp_path: Path) -> tuple[str, str]:
    """The page after its scripts have run, and what the browser says about it."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
