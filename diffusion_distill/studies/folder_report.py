"""report.html: one page of what a workdir holds, or several side by side.

Pictures first, then curves of every training, tables of results, what can be done next, and, folded, configs and
provenance. Nothing is measured or drawn anew: the page shows what the other modes have written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_distill.base.files import user_path
from diffusion_distill.report import page
from diffusion_distill.report.lines import Line, Panel
from diffusion_distill.studies.folder_contents import Holding, holdings
from diffusion_distill.studies.next_steps import next_steps

NAME = "report.html"
#: Figures of a training's log that have a chart, with their scales.
CURVES = {"loss": "log", "grad_norm": "log", "frechet": "log", "images_per_second": "linear", "mfu": "linear"}
ACROSS = "samples"
SENTENCES = {
    "training": "A training: its loss, what it drew, and the models it made.",
    "evaluation": "Measured samples: distances from reference images, and the first of the samples.",
    "comparison": "Solvers beside each other, as they are and fitted, by network calls and time.",
    "artefact": "A trained model.",
    "fit": "A fitted solver: one number for each network call.",
}
#: More pictures than this of one folder are left out.
MOST_PICTURES = 12


def write_report(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Writes the page of one folder or of several.

    Args:
      folders: workdirs, experiments' folders or artefacts; of several, the last part of each path is its name.
      path: of the page, which is replaced.

    Raises:
      FileNotFoundError: a folder is not there.
      ValueError: a folder that holds nothing to show, or no folders.
    """
    if not folders:
        raise ValueError("A report needs at least one folder.")
    places = [user_path(folder) for folder in folders]
    names = _names(places) if len(places) > 1 else [""]
    found = [holding for place, name in zip(places, names, strict=True) for holding in holdings(place, name)]
    title = " · ".join(place.absolute().name for place in places)
    parts: list[page.Part] = [*_pictures(found), *_charts(found), *_tables(found), *_commands(found), *_folded(found)]
    trouble = [sentence for holding in found for sentence in holding.trouble]
    if trouble:
        parts.insert(0, page.Text("\n\n".join(trouble)))
    return page.write_page(path, title, _what_you_see(found), parts)


def _names(places: Sequence[Path]) -> list[str]:
    """Short names of folders: their last parts, or whole paths where these are alike."""
    short = [place.absolute().name for place in places]
    return short if len(set(short)) == len(short) else [str(place) for place in places]


def _what_you_see(found: Sequence[Holding]) -> str:
    kinds = dict.fromkeys(holding.kind for holding in found if holding.kind)
    said = [SENTENCES[kind] for kind in kinds if kind in SENTENCES]
    return " ".join(said[:2]) or "What the folder holds."


def _pictures(found: Iterable[Holding]) -> list[page.Part]:
    return [
        page.Picture(path, f"{holding.name}: {path.name}")
        for holding in found
        for path in holding.pictures[:MOST_PICTURES]
    ]


def _charts(found: Sequence[Holding]) -> list[page.Part]:
    """One chart for each figure, a line for each training that has it."""
    charts: list[page.Part] = []
    for figure, scale in CURVES.items():
        lines = {}
        for holding in found:
            known = [r for r in holding.figures if _is_figure(r, ACROSS) and _is_figure(r, figure)]
            if len(known) > 1:
                lines[holding.name] = Line([r[ACROSS] for r in known], [r[figure] for r in known])
        if lines:
            positive = all(min(line.y) > 0 for line in lines.values())
            panel = Panel(lines, "training images", figure.replace("_", " "), "linear", scale if positive else "linear")
            charts.append(page.Chart(figure.replace("_", " "), panel))
    return charts


def _is_figure(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), int | float) and not isinstance(record[name], bool)


def _tables(found: Iterable[Holding]) -> list[page.Part]:
    """Rows of results; lists and mappings in them are left to the files."""
    tables: list[page.Part] = []
    for holding in found:
        rows = [{k: v for k, v in row.items() if isinstance(v, int | float | str | bool)} for row in holding.rows]
        if any(rows):
            tables.append(page.Table(rows, caption=holding.name))
    return tables


def _commands(found: Sequence[Holding]) -> list[page.Part]:
    """The commands that fit each folder, folded if there are several; not those of artefacts beside their training."""
    trainings = [holding.path for holding in found if holding.kind == "training"]
    own = [holding for holding in found if holding.path.parent not in trainings]
    steps = {holding.name: commands for holding in own if (commands := next_steps(holding))}
    lists = {name: page.Commands(commands) for name, commands in steps.items()}
    if len(lists) > 1:
        return [page.Heading("What to run next"), *(page.Folded(name, [part]) for name, part in lists.items())]
    return [page.Heading("What to run next"), *lists.values()] if lists else []


def _folded(found: Iterable[Holding]) -> list[page.Part]:
    """The files of each folder, without the rows that the tables show."""
    files = {
        holding.name: {
            f"{name}.json": {key: value for key, value in content.items() if key != "rows"}
            for name, content in holding.files.items()
        }
        for holding in found
        if holding.files
    }
    return [page.Heading("Configs and provenance"), *(page.Folded(*item) for item in files.items())] if files else []
