"""The report of a workdir, or of several beside each other: one page with what their files hold.

WORKDIR/report.html    results, curves, pictures, settings, and what can be done next

Only files are read; no model is loaded. What is damaged is named on the page and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_distill.base.files import user_path
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
from diffusion_distill.report.page import Part
from diffusion_distill.report.tables import is_number
from diffusion_distill.studies.folder_contents import Holding, holdings
from diffusion_distill.studies.lambdas import candidate_panels, lambda_panels
from diffusion_distill.studies.next_steps import CONFIG, artefacts_in, next_steps
from diffusion_distill.studies.trajectories import trajectory_panels
from diffusion_distill.training.workdir import changes

PAGE = "report.html"
MOST_PICTURES, MOST_BYTES = 24, 3_000_000  # on a page, and of one file
LARGEST = 1e300  # numbers beyond are no results
#: Names of studies whose numbers are drawn as charts, in place of the picture of the same name.
STUDIES: dict[str, Callable[[Any], list[dict[str, Panel]]]] = {
    "trajectories": lambda numbers: trajectory_panels(numbers, "logsnr"),
    "lambdas": lambda_panels,
    "candidates": candidate_panels,
}
#: Columns of results that say how a sampler was made, not how good it is.
NOT_MEASURED = {"nfe", "steps", "seed", "seconds", "samples/s", "fit seconds"}
#: Facts without which distances are not comparable.
COMPARABLE = ("features", "weights of the features", "reference hash")
#: What pictures are, by the names of their files.
CAPTIONS = {
    "picture.png": "samples",
    "samples.png": "the first samples",
    "quality.png": "quality by evaluations and by time",
    "loss.png": "losses",
    "similarity.png": "how alike the network's outputs of two rows are",
}
FIGURES = ("learning_rate", "grad_norm", "images_per_second", "mfu")


def folder_report(folders: Sequence[str | Path], path: str | Path, seen: str = "") -> Path:
    """Writes a page about what workdirs hold; those of several runs share tables and charts.

    Args:
      folders: workdirs of any mode, artefacts, or folders of them.
      path: of the page.
      seen: what one sees on it, in a sentence or two below its title; by default the kinds of files are counted.

    Returns:
      The path.

    Raises:
      FileNotFoundError: a folder that is not there.
      ValueError: no folders, or one that holds nothing to report.
    """
    names = distinct_names([user_path(folder) for folder in folders])
    if not names:
        raise ValueError("There are no folders. Name at least one workdir.")
    several = len(names) > 1
    found = [part for name, folder in names.items() for part in holdings(folder, name if several else "")]
    title = " · ".join(names)
    parts = [
        *_trouble(found), *_results(found), *_pictures(found), *_losses(found), *_studies(found), *_trainings(found),
        *_differences(found), *_next(found), *_facts(found),
    ]  # fmt: skip
    return write_page(path, title, seen or what_you_see(found), parts)


def distinct_names(folders: Sequence[Path]) -> dict[str, Path]:
    """name -> folder: the ends of the paths, of as few folders as tell them apart; the same folder twice is one."""
    folders = list(dict.fromkeys(folder.absolute() for folder in folders))
    for length in range(1, max((len(folder.parts) for folder in folders), default=0) + 1):
        names = {"/".join(folder.parts[-length:]): folder for folder in folders}
        if len(names) == len(folders):
            return names
    return {}


def what_you_see(found: Sequence[Holding]) -> str:
    """A sentence that counts what there is."""
    kinds = Counter(holding.kind for holding in found if holding.kind)
    of = {
        "training": "training", "artefact": "artefact", "results": "table of results", "evaluation": "evaluation",
        "comparison": "comparison of solvers", "fit": "fitted solver", "classifier": "classifier",
    }  # fmt: skip
    counted = [f"{count} {_plural(of.get(kind, f'study ({kind})'), count)}" for kind, count in kinds.items()]
    pictures = sum(len(holding.pictures) for holding in found)
    counted += [f"{pictures} {_plural('picture', pictures)}"] * bool(pictures)
    sentence = f"{_listed(counted)}." if counted else "Figures of a run."
    return f"What the files here hold: {sentence} A click on a heading sorts its table."


def _plural(name: str, count: int) -> str:
    first, *rest = name.split(" ", 1)
    words = first if count == 1 else "studies" if first == "study" else f"{first}s"
    return " ".join([words, *rest])


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _trouble(found: Sequence[Holding]) -> list[Part]:
    return [Text(sentence) for holding in found for sentence in holding.trouble]


# Results


def _results(found: Sequence[Holding]) -> list[Part]:
    """One table of all results, and their numbers against evaluations."""
    measured = [holding for holding in found if holding.rows]
    if not measured:
        return []
    named = len(measured) > 1
    rows = [({"run": holding.name} if named else {}) | _plain(row) for holding in measured for row in holding.rows]
    parts: list[Part] = [Heading("Results")]
    facts = [holding.files.get("results", {}) for holding in measured]
    differing = [name for name in COMPARABLE if len({str(fact.get(name)) for fact in facts}) > 1]
    if differing:
        parts.append(Text(f"These results differ in {_listed(differing)}, so their distances are not comparable."))
    rows = [row for row in rows if row]
    parts += [Table(rows)] if rows else []
    charts = [Chart(f"{name} by evaluations", panel) for name, panel in _quality(rows).items()]
    return parts + ([Beside(charts)] if charts else [])


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a table can show of a row of results: numbers and text. A fitted solver is called D-."""
    plain = {
        str(name): None if value == "" else value
        for name, value in row.items()
        if value is None or isinstance(value, (str, int, float))
    }
    if isinstance(plain.get("fitted"), bool) and plain.pop("fitted") and "solver" in plain:
        plain["solver"] = f"D-{plain['solver']}"
    return plain


def _quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, Panel]:
    """measure -> its lines against evaluations, for measures and samplers with several numbers of them."""
    lines: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        names = [str(row[name]) for name in ("run", "method", "solver") if name in row]
        if not _finite(row.get("nfe")) or row["nfe"] <= 0 or not names:
            continue
        for measure, value in row.items():
            if _is_measure(measure) and _finite(value):
                lines.setdefault(measure, {}).setdefault(", ".join(names), {})[float(row["nfe"])] = float(value)
    panels = {}
    for measure, named in lines.items():
        drawn = {name: _line_of(sorted(line.items())) for name, line in named.items()}
        if any(len(line) > 1 for line in named.values()):
            panels[measure] = Panel(drawn, "network evaluations", measure, "log", "auto")
    return panels


def _is_measure(name: str) -> bool:
    return name not in NOT_MEASURED and not name.endswith((" min", " std"))


# Pictures


def _pictures(found: Sequence[Holding]) -> list[Part]:
    """The pictures, those of one name side by side; of too many the first, and none that would make the page heavy."""
    named: dict[str, list[Part]] = {}
    left_out, count = [], 0
    for holding in found:
        for path in holding.pictures:
            name = path.relative_to(holding.path).as_posix()
            if path.stem in STUDIES and path.stem in holding.files:
                continue  # drawn as charts
            if count == MOST_PICTURES or path.stat().st_size > MOST_BYTES:
                left_out.append(f"{holding.name}/{name}")
                continue
            count += 1
            said = f": {CAPTIONS[name]}" if name in CAPTIONS else ""
            named.setdefault(name, []).append(Picture(path, f"{holding.name}/{name}{said}"))
    parts = [shown for pictures in named.values() for shown in (pictures if len(pictures) == 1 else [Beside(pictures)])]
    parts = list(map(_safe, parts))
    parts += [Text(f"Too large or too many for this page: {', '.join(left_out)}.")] if left_out else []
    return [Heading("Pictures"), *parts] if parts else []


def _safe(part: Part) -> Part:
    """The part as it is, or what is wrong with the files it shows."""
    try:
        part.html()
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        return Text(f"Left out, because it cannot be shown: {error}")
    return part


# Curves


def _losses(found: Sequence[Holding]) -> list[Part]:
    """Losses, and figures that were measured during training; the others are folded."""
    trained = [holding for holding in found if holding.figures]
    losses = {holding.name: line for holding in trained if (line := _line(holding, "loss"))}
    if not losses:
        return []
    phases = _phases(trained[0]) if len(losses) == 1 else None
    title = "Loss" if len(losses) == 1 else "Losses"
    parts: list[Part] = [Heading("Training"), _chart(title, losses, "loss", phases)]
    kinds = {(str(h.files.get("run", {}).get("method")), str(_reduction(h))) for h in trained}
    if len(kinds) > 1:
        parts.append(Text("Methods have different losses: compare curves of the same method and reduction only."))
    measured = sorted({name for h in trained for record in h.figures for name in record if "/" in name})
    for measure in dict.fromkeys(name.partition("/")[0] for name in measured):
        lines = {
            f"{holding.name}, {name.partition('/')[2]}": line
            for name in measured if name.startswith(f"{measure}/")
            for holding in trained if (line := _line(holding, name))
        }  # fmt: skip
        parts += [_chart(f"{measure}, measured during training", lines, measure)] if lines else []
    more = [
        _chart(name.replace("_", " "), lines, name.replace("_", " "))
        for name in FIGURES
        if (lines := {holding.name: line for holding in trained if (line := _line(holding, name))})
    ]
    return parts + ([Folded("Learning rate, gradient norm, speed", more)] if more else [])


def _chart(title: str, lines: Mapping[str, Line], ylabel: str, phases: Mapping[str, float] | None = None) -> Chart:
    return Chart(title, Panel(lines, "training images", ylabel, yscale="auto", marks=phases))


def _line(holding: Holding, name: str) -> Line | None:
    """A figure against training images; None if no record has it as a finite number."""
    points = [
        (float(record["samples"]), float(record[name]))
        for record in holding.figures
        if _finite(record.get(name)) and _finite(record.get("samples"))
    ]
    return _line_of(points) if points else None


def _line_of(points: Sequence[tuple[float, float]]) -> Line:
    return Line([x for x, _ in points], [y for _, y in points])


def _finite(value: Any) -> bool:
    """Whether a value from a file is a number that can be drawn."""
    return is_number(value) and abs(value) < LARGEST


def _phases(holding: Holding) -> dict[str, float]:
    """phase -> where its first record is, if there are several phases."""
    starts: dict[str, float] = {}
    for record in holding.figures:
        if _finite(record.get("samples")):
            starts.setdefault(str(record.get("phase", "")), float(record["samples"]))
    return starts if len(starts) > 1 else {}


def _reduction(holding: Holding) -> Any:
    return _inside(holding.files.get("run", {}), "method_settings").get("reduction")


def _inside(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping in a file; empty where there is none."""
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


# Studies


def _studies(found: Sequence[Holding]) -> list[Part]:
    """The charts of trajectories, lambdas and candidates."""
    parts: list[Part] = []
    for holding in found:
        for name, panels_of in STUDIES.items():
            if name not in holding.files:
                continue
            parts.append(Heading(f"{holding.name}: {name}"))
            try:
                rows = panels_of(holding.files[name])
            except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
                parts.append(Text(f"{name}.json cannot be drawn: {type(error).__name__}: {error}"))
                continue
            parts += [Beside([_safe(Chart(title, panel)) for title, panel in row.items()]) for row in rows]
    return parts


# What there is, and its settings


def _trainings(found: Sequence[Holding]) -> list[Part]:
    """Tables of the trainings and of the artefacts."""
    trained = [_training(holding) for holding in found if holding.figures or holding.kind == "training"]
    made = [_artefact(holding, len(found) > 1) for holding in found if "model" in holding.files]
    parts: list[Part] = [Heading("Runs and artefacts")] if trained or made else []
    parts += [Table(trained, caption="Trainings")] if trained else []
    return parts + ([Table(made, caption="Artefacts: teachers and students")] if made else [])


def _training(holding: Holding) -> dict[str, Any]:
    """One line about a training: how far it is."""
    run, last = holding.files.get("run", {}), holding.figures[-1] if holding.figures else {}
    row: dict[str, Any] = {"run": holding.name, "method": run.get("method"), "phase": last.get("phase")}
    for name, title in (("update", "updates"), ("samples", "images"), ("loss", "last loss"), ("skipped", "skipped")):
        row[title] = last.get(name)
    row["images/s"] = last.get("images_per_second")
    row["artefacts"] = len(artefacts_in(holding.path))
    return row


def _artefact(holding: Holding, several: bool) -> dict[str, Any]:
    """One line about an artefact."""
    described, made = holding.files["model"], holding.files.get("provenance", {})
    model = _inside(described, "model")
    shape = model.get("shape")
    return {
        "artefact": holding.name,
        "steps": described.get("steps") or None,
        "method": made.get("method"),
        "updates": made.get("updates"),
        "network": _inside(model, "network").get("name"),
        "process": _inside(model, "process").get("name"),
        "prediction": model.get("prediction"),
        "shape": "×".join(map(str, shape)) if isinstance(shape, list) else None,
    }


def _differences(found: Sequence[Holding]) -> list[Part]:
    """The settings in which trainings differ, one column for each."""
    runs = {holding.name: holding.files["run"] for holding in found if "run" in holding.files}
    if len(runs) < 2:
        return []
    first, *others = runs.values()
    kept = ("model", "student", "method", "method_settings", "settings", "data")
    names = dict.fromkeys(change.name for other in others for change in changes(first, other))
    rows = [
        {"setting": name} | {run: _shown(_at(content, name)) for run, content in runs.items()}
        for name in names
        if name.split(".")[0] in kept
    ]
    return [Folded("Settings that differ between the trainings", [Table(rows)])] if rows else []


def _at(content: Any, name: str) -> Any:
    """A field by its dotted name; None where there is none."""
    for part in name.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _shown(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else f"{value!s:.60}"


def _facts(found: Sequence[Holding]) -> list[Part]:
    """What the files say in full, folded; results without their rows."""
    parts: list[Part] = []
    for holding in found:
        files = {name: content for name, content in holding.files.items() if name not in (*STUDIES, "similarity")}
        if "results" in files:
            files["results"] = {name: value for name, value in files["results"].items() if name != "rows"}
        if files:
            parts.append(Folded(holding.name, {f"{name}.json": content for name, content in files.items()}))
    return [Heading("Settings and provenance"), *parts] if parts else []


def _next(found: Sequence[Holding]) -> list[Part]:
    """What can be done next with each folder; artefacts inside a training are its own."""
    trained = [holding.path for holding in found if holding.kind == "training"]
    own = [holding for holding in found if not (holding.kind == "artefact" and holding.path.parent in trained)]
    parts: list[tuple[str, Part]] = [(h.name, Commands(steps)) for h in own if (steps := next_steps(h))]
    if not parts:
        return []
    said = Text(f"{CONFIG} stands for the config of the run, or another one for the same data.")
    shown: Iterable[Part] = [part for _, part in parts]
    if len(parts) > 1:
        shown = [Folded(name, [part]) for name, part in parts]
    return [Heading("What to do next"), said, *shown]
