"""What a workdir holds, read from its files: runs, figures, results, artefacts and pictures.

A workdir belongs to a training, an evaluation, a comparison, a fit or a look at solvers, or is an artefact itself; the
names of its files say which. The folder of an experiment has several of them as folders inside.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_distill.base.files import read_json, user_path
from diffusion_distill.training.logs import read_json_lines

#: Files in JSON that the modes write, without their ending.
KNOWN = (
    "run", "results", "evaluation", "comparison", "solver", "classifier", "trajectories", "similarity", "lambdas",
    "candidates", "model", "provenance",
)  # fmt: skip
METRICS, UNFINISHED_RESULTS = "metrics.jsonl", "results.jsonl"
DEPTH = 2  # of folders inside folders that are looked at
SKIPPED = {"checkpoints", "params", "parts", "fits", "samples"}
#: Pictures by their place on a page; others follow in the order of their names.
FIRST = ("picture.png", "samples.png", "quality.png")


@dataclass(frozen=True)
class Holding:
    """One folder.

    Attributes:
      name: as it is called on the page.
      path: of the folder.
      files: name in `KNOWN` -> what the file holds.
      figures: records of metrics.jsonl, in their order.
      rows: of results.json, or of results.jsonl while a comparison is not finished.
      pictures: PNG files; of those drawn during training the last one.
      trouble: what could not be read, in sentences.
    """

    name: str
    path: Path
    files: Mapping[str, Mapping[str, Any]]
    figures: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    pictures: Sequence[Path]
    trouble: Sequence[str]

    @property
    def kind(self) -> str:
        """What it is: 'training', 'artefact', 'evaluation', ..., or '' for a folder of others."""
        named = {"run": "training", "model": "artefact", "solver": "fit"}
        found = next((name for name in (*named, *KNOWN) if name in self.files), "")
        return named.get(found, found)


def holdings(folder: str | Path, name: str = "") -> list[Holding]:
    """What a folder and the folders inside hold, the folder first; those that hold nothing known are left out.

    Args:
      name: of the folder on the page, put before those of the folders inside; "" leaves it out there.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds nothing that a page could show.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Give the workdir of a run, an evaluation or another mode."
        )
    found = []
    for path in _folders(folder, DEPTH):
        inside = path.relative_to(folder).as_posix()
        label = "/".join(part for part in (name, inside) if part not in ("", ".")) or folder.absolute().name
        holding = read(path, label)
        if holding.files or holding.figures or holding.rows or holding.pictures or holding.trouble:
            found.append(holding)
    if not found:
        raise ValueError(
            f"{folder} holds nothing to report: no run.json, metrics.jsonl, results.json, model.json or picture."
        )
    return found


def read(path: Path, name: str) -> Holding:
    """What one folder holds, without the folders inside. Files that cannot be read are told of, and left out."""
    files, trouble = {}, []
    for known in KNOWN:
        if (path / f"{known}.json").is_file():
            try:
                files[known] = read_json(path / f"{known}.json", "It is left out here.")
            except (OSError, ValueError) as error:
                trouble.append(str(error))
    lines = {}
    for file in (METRICS, UNFINISHED_RESULTS):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                lines[file] = read_json_lines(path / file) if (path / file).is_file() else []
            except OSError as error:
                lines[file] = []
                trouble.append(f"{path / file} cannot be read: {error.strerror}. It is left out here.")
        trouble += [str(warning.message) for warning in told]
    rows = files.get("results", {}).get("rows", lines[UNFINISHED_RESULTS])
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return Holding(name, path, files, lines[METRICS], rows, _pictures(path, drawn="run" in files), trouble)


def _folders(folder: Path, depth: int) -> list[Path]:
    """The folder, and those inside that may hold something, in the order of their names and of numbers in these."""
    if not depth:
        return [folder]
    names = sorted((e.name for e in os.scandir(folder) if e.is_dir(follow_symlinks=False)), key=_by_number)
    inside = [folder / name for name in names if name not in SKIPPED and not name.startswith(".")]
    return [folder, *(found for path in inside for found in _folders(path, depth - 1))]


def _by_number(name: str) -> list[tuple[str, int]]:
    """Sorts student_2 before student_16."""
    return [(text, int(number or 0)) for text, number in re.findall(r"([^0-9]*)([0-9]*)", name)]


def _pictures(path: Path, drawn: bool) -> list[Path]:
    """The PNG files in a folder, and the last that was drawn during its training."""
    found = [file for file in path.glob("*.png") if file.is_file()]
    order = {name: place for place, name in enumerate(FIRST)}
    found.sort(key=lambda file: (order.get(file.name, len(FIRST)), file.name))
    samples = [file for file in path.glob("samples/*.png") if file.stem.isdecimal()] if drawn else []
    return found + ([max(samples, key=lambda file: int(file.stem))] if samples else [])
