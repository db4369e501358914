"""What can be done next with a folder: the commands that fit what it holds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from diffusion_distill.studies.folder_contents import Holding

#: Stands for the file that only the user knows.
CONFIG = "CONFIG.py"


def next_steps(found: Holding) -> dict[str, str]:
    """Sentence -> command; empty for a folder that suggests none. CONFIG.py stands for a config of the same data."""
    steps = {"training": _after_training, "artefact": _of_artefact, "fit": _after_fit, "comparison": _after_comparison}
    if found.kind in steps:
        return steps[found.kind](found)
    if found.kind == "classifier":
        of = {"config.artefact": "ARTEFACT", "config.evaluation.features": found.path}
        return {"Measure with its features": _command("evaluate", Path("RESULTS"), **of)}
    return {}


def artefacts_in(folder: Path) -> list[Path]:
    """The folders of artefacts in a training's folder: the teacher, or students, those of the fewest steps first."""
    found = [path.parent for path in folder.glob("*/model.json")]
    return sorted(found, key=lambda path: (_steps(path.name), path.name))


def last_student(run: Any) -> str:
    """The folder of the artefact with which a run ends, from its run.json; "" if that does not say."""
    settings = run.get("method_settings", {}) if isinstance(run, dict) else {}
    settings = settings if isinstance(settings, dict) else {}
    schedule = settings.get("schedule")
    ends = schedule[-1] if isinstance(schedule, list) and schedule else settings.get("end_steps")
    if run.get("method") == "Denoising":
        return "teacher"
    return f"student_{ends}" if isinstance(ends, int) else ""


def _after_training(found: Holding) -> dict[str, str]:
    run, folder = found.files["run"], found.path
    artefacts, last = artefacts_in(folder), last_student(run)
    mode = "train" if last == "teacher" else "distill" if "method" in run else "classifier"
    if mode == "classifier":
        finished = (folder / "classifier" / "classifier.json").is_file()
    else:
        finished = (folder / last / "model.json").is_file() if last else bool(artefacts)
    steps = {}
    if not finished:
        steps["Go on: the command that began the run takes it up at its newest checkpoint"] = _command(mode, folder)
    if artefacts:
        steps |= _with_artefact(artefacts[0], folder, _steps(artefacts[0].name) == 1)
    return steps


def _of_artefact(found: Holding) -> dict[str, str]:
    return _with_artefact(found.path, found.path, found.files["model"].get("steps") == 1)


def _with_artefact(artefact: Path, workdir: Path, single: bool) -> dict[str, str]:
    """What is done with an artefact; what a training writes goes to a folder beside its workdir.

    Args:
      single: it is a student of one step, which cannot be made any faster.
    """
    given, name, beside = {"config.artefact": artefact}, artefact.name, workdir.parent / f"{workdir.name}_next"
    steps = {
        f"Draw images of {name}": _command("sample", workdir, **given),
        f"Measure {name} against data": _command("evaluate", workdir, **given),
    }
    if not single:
        steps[f"Distil {name} to fewer steps"] = _command("distill", beside, **{"config.teacher": artefact})
        steps[f"Compare solvers on {name}"] = _command("solvers", beside, **given)
    steps[f"Write {name} for other programs"] = _command("export", workdir / "exports", model=artefact)
    return steps


def _after_fit(found: Holding) -> dict[str, str]:
    given = {"config.artefact": "ARTEFACT", "config.sample.fitted": found.path / "solver.json"}
    return {
        "Draw images with the fitted solver": _command("sample", found.path, **given),
        "Measure it against data": _command("evaluate", found.path, **given),
        "Draw its lambdas": _command("lambdas", found.path, **{"config.sample.fitted": found.path / "solver.json"}),
    }


def _after_comparison(found: Holding) -> dict[str, str]:
    steps = {}
    if "results" not in found.files:
        steps["Go on: the command that began the comparison measures what is missing"] = _command("solvers", found.path)
    if any(found.path.glob("fits/*.json")):
        given = {"config.sample.fitted": found.path / "fits"}
        steps["Draw the lambdas of its fitted solvers"] = _command("lambdas", found.path, **given)
    return steps


def _command(mode: str, workdir: Path, **flags: Any) -> str:
    """A command, a line for the mode and one for each flag; words that a shell would take apart are quoted."""
    first = {} if mode == "export" else {"config": CONFIG}
    given: dict[str, Any] = {**first, "workdir": workdir, **flags}
    words = [shlex.quote(f"--{name}={value}") for name, value in given.items()]
    return " \\\n    ".join([f"python -m diffusion_distill.main --mode={mode}", *words])


def _steps(name: str) -> int:
    """The steps in the name of a student's folder; 0 for others."""
    ending = name.rpartition("_")[2]
    return int(ending) if ending.isdecimal() else 0
