"""What is made of the cells that are done: a table (Markdown, CSV, JSON), a figure and a page.

Numbers are mean ± standard deviation over the seeds that are done; a single seed has none. Beside a number stands the
paper's, where it is known here: on other data and networks only their order can be compared.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from diffusion_distill.base.whole import whole, write_json
from diffusion_distill.report import page
from diffusion_distill.report.lines import Line, Panel, line_plot

from .scales import Scale

if TYPE_CHECKING:
    from .runner import Experiment

TITLES = {
    "frechet": "Fréchet distance",
    "error": "distance from the fine solution",
    "precision": "precision",
    "recall": "recall",
    "seconds": "seconds",
}
Key = tuple[str, Any]


def collect(experiment: Experiment, scale: Scale) -> None:
    """Writes RESULTS/NAME/SCALE/{table.md,table.csv,table.json,figure.png,report.html} and prints the table."""
    rows, folder = experiment.rows(scale.folder), experiment.folder(scale.folder)
    if not rows:
        print(f"No cell of {experiment.name} at the scale '{scale.folder}' is done yet.")
        return
    found, note = summarised(rows, experiment.measure), conventions(scale, rows)
    write_json(folder / "table.json", {"title": experiment.title, "conventions": note, "rows": rows})
    parts: list[page.Part] = [page.Text(f"The paper says: {experiment.says}")]
    if found:
        text = f"{experiment.title}; {experiment.column} →\n\n{markdown(found, experiment.paper)}\n\n{note}\n"
        print(f"\n{text}")
        _write(folder / "table.md", text)
        _write(folder / "table.csv", _csv(rows))
        panels = panels_of(experiment, scale, rows)
        line_plot([panels], folder / "figure.png")
        parts += [page.Chart(f"{TITLES[experiment.measure]}, {title}", panel) for title, panel in panels.items()]
        parts.append(page.Table(as_rows(found, experiment.paper)))
    parts += [page.Picture(folder / row["picture"], row["caption"]) for row in rows if "picture" in row]
    parts.append(page.Text(note))
    if found:
        parts += [page.Heading("Every cell"), page.Table(rows)]
    seen = f"{TITLES[experiment.measure]}; less is better." if found else "Pictures, with their captions."
    print(f"The page is {page.write_page(folder / 'report.html', experiment.title, seen, parts)}.")


def summarised(rows: Iterable[Mapping[str, Any]], measure: str) -> dict[Key, list[float]]:
    """(row, column) -> the numbers of its seeds."""
    found: dict[Key, list[float]] = {}
    for row in rows:
        if measure in row:
            found.setdefault((row["row"], row["column"]), []).append(row[measure])
    return found


def markdown(found: Mapping[Key, Sequence[float]], paper: Mapping[Key, float]) -> str:
    """The table in Markdown: a line for each row; the paper's numbers in brackets."""
    table = as_rows(found, paper)
    columns = list(table[0])
    lines = [columns, ["---"] * len(columns), *([str(row[name]) for name in columns] for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_rows(found: Mapping[Key, Sequence[float]], paper: Mapping[Key, float]) -> list[dict[str, str]]:
    """The table as one dictionary for each line."""
    rows = list(dict.fromkeys(row for row, _ in found))
    columns = sorted(dict.fromkeys(column for _, column in found), key=_order)
    return [{"": row, **{str(c): in_words(found.get((row, c)), paper.get((row, c))) for c in columns}} for row in rows]


def in_words(values: Sequence[float] | None, published: float | None = None) -> str:
    """Mean ± standard deviation, and the paper's number."""
    known = "" if published is None else f" [{published:g}]"
    if not values:
        return f"–{known}"
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.3g}{spread}{known}"


def conventions(scale: Scale, rows: Sequence[Mapping[str, Any]]) -> str:
    """How the numbers were measured."""
    if scale.trial:
        return "A trial: it shows that everything works, and its numbers mean nothing."
    how = scale.evaluation
    judge = "a classifier of the same digits" if scale.judge else "InceptionV3"
    seeds = len({row["seed"] for row in rows})
    spread = f"mean ± standard deviation of up to {seeds} seeds, one where there is no ±" if seeds > 1 else "one seed"
    data = [scale.teachers[name].data for name in dict.fromkeys(row["teacher"] for row in rows)]
    main = scale.teachers["vp"].data
    title = "; ".join([scale.title, *(name for name in dict.fromkeys(data) if name != main)])
    return (
        f"Data and network: {title}. {how.count} samples, {how.repetitions} time(s); features of {judge}; "
        f"{spread}. Numbers in brackets are the paper's, of its own data and InceptionV3."
    )


def panels_of(experiment: Experiment, scale: Scale, rows: Sequence[Mapping[str, Any]]) -> dict[str, Panel]:
    """The figure's panels by title: one, or one for each teacher, in which its name is left out."""
    if not experiment.apart:
        return {experiment.title: panel_of(experiment, summarised(rows, experiment.measure))}
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["teacher"], []).append({**row, "row": row["row"].partition(",")[0]})
    return {
        scale.teachers[name].data: panel_of(experiment, summarised(part, experiment.measure))
        for name, part in parts.items()
    }


def panel_of(experiment: Experiment, found: Mapping[Key, Sequence[float]]) -> Panel:
    """The measure by column, a line for each row; columns that are no numbers stand side by side."""
    columns = sorted(dict.fromkeys(column for _, column in found), key=_order)
    numbers = all(isinstance(column, int | float) for column in columns)
    places = {column: column if numbers else index for index, column in enumerate(columns)}
    lines = {}
    for row in dict.fromkeys(row for row, _ in found):
        points = [(places[c], mean(found[row, c])) for c in columns if (row, c) in found]
        xs, ys = zip(*points, strict=True)
        dashed = row.startswith("D-")
        lines[row] = Line(xs, ys, "--" if dashed else "-", "o", row.removeprefix("D-") if dashed else row)
    scale = "log" if numbers and min(columns) > 0 and max(columns) > 4 * min(columns) else "linear"
    label = experiment.column if numbers else f"{experiment.column}: {', '.join(map(str, columns))}"
    return Panel(lines, label, TITLES[experiment.measure], scale, "log")


def _order(column: Any) -> tuple[bool, Any]:
    return (isinstance(column, str), column if not isinstance(column, str) else 0)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Any, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as half:
        half.write_text(text, encoding="utf-8")
