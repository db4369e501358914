"""A page: one HTML file that shows text, pictures, charts and tables, and needs nothing but itself.

    write_page("runs/mine/report.html", "Mine", "Three students, drawn from the same noise.", [
        Picture("runs/mine/picture.png", "one row per student"),
        Chart("Losses", Panel({"student": Line(images, losses)}, "training images", "loss", yscale="auto")),
        Table([{"student": "TRACT", "nfe": 1, "frechet": 0.507}]),
    ])

Style and script are in the page; pictures are part of it. The page's own security policy forbids the browser to load or
run anything else. All text is escaped, so names and settings from files cannot become markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

from diffusion_distill.base.files import plain, stand_in_of, user_path
from diffusion_distill.base.whole import whole
from diffusion_distill.report.chart import chart_html
from diffusion_distill.report.lines import Panel
from diffusion_distill.report.tables import Row, cells_of, columns_of, is_number

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 320  # pictures that are narrower are enlarged to about this width
SHOWN_ENTRIES = 24  # of a list of numbers in folded JSON


class Part(Protocol):
    """Anything that a page can show."""

    def html(self) -> str:
        """Markup in which all text is escaped."""
        ...


def write_page(path: str | Path, title: str, what_you_see: str, parts: Sequence[Part]) -> Path:
    """Writes a page, whole or not at all.

    Args:
      path: the file; folders above it are made.
      title: of the page and of its tab.
      what_you_see: one or two sentences below the title.
      parts: in the order in which they are shown.

    Returns:
      The path.

    Raises:
      ValueError, TypeError, OSError: what a part raises about its content.
    """
    path = user_path(path)
    text = page_html(title, what_you_see, parts)
    with whole(path) as half:
        half.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return path


def page_html(title: str, what_you_see: str, parts: Sequence[Part]) -> str:
    """The text of a page; arguments and errors as of `write_page`."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = "\n".join(part.html() for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(what_you_see)}</p>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Heading:
    """The title of what follows."""

    text: str

    def html(self) -> str:
        """As `Part` says."""
        return f"<h2>{escape(self.text)}</h2>"


@dataclass(frozen=True)
class Text:
    """Sentences; an empty line begins a new paragraph."""

    text: str

    def html(self) -> str:
        """As `Part` says."""
        return "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in self.text.split("\n\n"))


@dataclass(frozen=True)
class Commands:
    """What can be done next: sentence -> the command that does it."""

    commands: Mapping[str, str]

    def html(self) -> str:
        """As `Part` says."""
        items = (f"<dt>{escape(what)}</dt><dd><pre>{escape(line)}</pre></dd>" for what, line in self.commands.items())
        return f'<dl class="commands">{"".join(items)}</dl>'


@dataclass(frozen=True)
class Table:
    """Rows of results, which a click on a heading sorts.

    Attributes:
      rows: one mapping column -> value per line. Columns of numbers are aligned right and show 4 significant digits.
      columns: which columns, in this order; None takes all, in the order in which they first appear.
      caption: a line above the table.
    """

    rows: Sequence[Row]
    columns: Sequence[str] | None = None
    caption: str = ""

    def html(self) -> str:
        """As `Part` says.

        Raises:
          ValueError: no rows, or a column that no row has.
        """
        columns = columns_of(self.rows, self.columns)
        [_, *lines], right = cells_of(self.rows, columns)
        looks = [' class="number"' if number else "" for number in right]
        heads = (
            f'<th scope="col" aria-sort="none"{look}><button type="button">{escape(str(column))}</button></th>'
            for column, look in zip(columns, looks, strict=True)
        )
        body = []
        for row, line in zip(self.rows, lines, strict=True):
            cells = zip([row.get(column) for column in columns], line, looks, strict=True)
            body.append("".join(f"<td{look}{_sorted_by(value)}>{escape(text)}</td>" for value, text, look in cells))
        rows = "\n".join(f"<tr>{line}</tr>" for line in body)
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = f"<thead><tr>{''.join(heads)}</tr></thead>"
        return f'<div class="scroll"><table>{caption}{head}<tbody>\n{rows}\n</tbody></table></div>'


def _sorted_by(value: Any) -> str:
    """The attribute with the number in full, by which a cell is sorted; text is sorted by what is shown."""
    if not is_number(value):
        return ""
    return f' data-value="{int(value) if isinstance(value, Integral) else float(value)!r}"'


@dataclass(frozen=True)
class Picture:
    """A PNG, which becomes part of the page. Browsers enlarge small ones, smoothly.

    Attributes:
      path: the file, or its bytes.
      caption: a line below it, and what is read out instead of it.
    """

    path: str | Path | bytes
    caption: str = ""

    def html(self) -> str:
        """As `Part` says.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no PNG.
        """
        content = self.path if isinstance(self.path, bytes) else user_path(self.path).read_bytes()
        if not content.startswith(PNG) or len(content) < 24:
            found = "" if isinstance(self.path, bytes) else stand_in_of(user_path(self.path))
            name = "The picture" if isinstance(self.path, bytes) else str(self.path)
            raise ValueError(f"{name} is no PNG{f', but {found}' if found else ''}. Pages show PNG files only.")
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # in the header chunk
        scale = max(1, SMALL // max(width, 1))
        size = f'width="{scale * width}" height="{scale * height}"'
        data = base64.b64encode(content).decode()
        image = f'<img {size} alt="{escape(self.caption)}" src="data:image/png;base64,{data}">'
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure class="picture">{image}{caption}</figure>'


@dataclass(frozen=True)
class Chart:
    """Lines on common axes, whose values show where the pointer is.

    Attributes:
      title: a line above the chart.
      panel: as `line_plot` draws it. Long lines are thinned to some 500 points, which keep its peaks.
    """

    title: str
    panel: Panel

    def html(self) -> str:
        """As `Part` says.

        Raises:
          ValueError: a panel without lines, or a line with nothing to show.
        """
        return chart_html(self.title, self.panel)


@dataclass(frozen=True)
class Beside:
    """Parts side by side where the page is wide enough, such as those of several runs."""

    parts: Sequence[Part]

    def html(self) -> str:
        """As `Part` says."""
        return f'<div class="beside">{"".join(f"<div>{part.html()}</div>" for part in self.parts)}</div>'


@dataclass(frozen=True)
class Folded:
    """A section that is closed at first.

    Attributes:
      title: what one clicks on.
      content: JSON-ready, of whose long lists the beginning is shown; or parts of a page.
    """

    title: str
    content: Any

    def html(self) -> str:
        """As `Part` says.

        Raises:
          TypeError: content that JSON cannot hold.
        """
        parts = isinstance(self.content, (list, tuple)) and all(hasattr(part, "html") for part in self.content)
        inner = (
            "\n".join(part.html() for part in self.content) if parts else f"<pre>{escape(_json(self.content))}</pre>"
        )
        return f"<details><summary>{escape(self.title)}</summary>{inner}</details>"


def _json(content: Any, indent: str = "") -> str:
    """JSON with short lists on one line and long ones cut short, with their length."""
    deeper = indent + "  "
    if isinstance(content, Mapping) and content:
        lines = [f"{deeper}{json.dumps(str(k), ensure_ascii=False)}: {_json(v, deeper)}" for k, v in content.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(content, (list, tuple)):
        rest = len(content) - SHOWN_ENTRIES
        entries = [_json(entry, deeper) for entry in content[:SHOWN_ENTRIES]]
        entries += [f"… {rest} more"] if rest > 0 else []
        if any(isinstance(entry, (Mapping, list, tuple)) and entry for entry in content):
            return "[\n" + ",\n".join(deeper + entry for entry in entries) + f"\n{indent}]"
        return f"[{', '.join(entries)}]"
    return json.dumps(content, ensure_ascii=False, default=plain)
