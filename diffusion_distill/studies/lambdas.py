"""Lambdas of fitted solvers against row and level, and what each candidate of a search was worth.

Figures of D-ODE's paper, arXiv:2309.16421 (its Figure 8b, c are of candidates):

FOLDER/lambdas.png, candidates.png      the figures
FOLDER/lambdas.json, candidates.json    what is drawn, and what is what
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffusion_distill.base.files import user_path
from diffusion_distill.report import Line, Panel, line_plot
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.search import Search
from diffusion_distill.studies.subject import finite, plain, write
from diffusion_distill.studies.trajectories import AXES

STYLES = ("-", "--", ":", "-.")
#: What the numbers of each file are.
LAMBDAS = {
    "rows": "network evaluations",
    "logsnr": "2·log(alpha / sigma) of the level that the network is told in each row",
    "lambdas": "in the paper's convention, for each row one per direction; 0 where a row has no direction",
}
CANDIDATES = {
    "metric": "by which the best was chosen",
    "candidates": "the lambdas that were tried, one for all rows, in the paper's convention",
    "values": "of the metric",
    "at edge": "whether the best is the least or the greatest candidate",
}
#: Files of studies, which are no fitted solvers.
WRITTEN = ("trajectories", "similarity", "lambdas", "candidates")


def fits_in(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The first argument of `lambdas` from a fitted solver's file, or from all in a folder.

    Raises:
      FileNotFoundError: there is none.
    """
    return {label: (fit.lambdas, fit.base.level.logsnr) for label, fit in _labelled(path).items()}


def searches_in(path: str | Path) -> dict[str, Search]:
    """The first argument of `candidates` from the same; empty if no lambda was searched. Errors as in `fits_in`."""
    return {label: fit.search for label, fit in _labelled(path).items() if fit.search}


def _labelled(path: str | Path) -> dict[str, FittedSolver]:
    path = user_path(path)
    files = [file for file in sorted(path.glob("*.json")) if file.stem not in WRITTEN] if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"The folder {path} holds no fitted solver. --mode=fit and --mode=solvers write them.")
    found = {file: FittedSolver.load(file) for file in files}
    return {
        f"D-{fit.solver}, {fit.base.nfe} NFE{'' if len(files) == 1 else f' ({file.stem})'}": fit
        for file, fit in found.items()
    }


def lambdas(fits: Mapping[str, tuple[ArrayLike, ArrayLike]], folder: str | Path) -> dict[str, Any]:
    """Lambdas of D-ODE solvers against the row and against its level, a line for each fit and direction.

    Args:
      fits: label -> (lambdas [rows, D], logsnr of the rows [rows]), such as those of `dode.fit` and its table.

    Returns:
      What the JSON file holds; `fits` has for each label rows, logsnr [rows] and lambdas [rows][D].

    Raises:
      ValueError: no fits, shapes that disagree, or values that are not finite.
    """
    if not fits:
        raise ValueError("There are no fits. Pass at least one entry {label: (lambdas, logsnr)}.")
    found = {}
    for label, pair in fits.items():
        values, logsnr = (np.asarray(part, np.float64) for part in pair)
        if values.ndim != 2 or not values.size or logsnr.shape != values.shape[:1]:
            raise ValueError(
                f"Fit {label!r} needs lambdas [rows, D] and logsnr [rows], got {values.shape} and {logsnr.shape}."
            )
        found[label] = {"rows": len(values), "logsnr": logsnr, "lambdas": finite(label, values)}
    numbers = plain({"what": LAMBDAS, "fits": found})
    write(folder, "lambdas", numbers, partial(line_plot, lambda_panels(numbers)))
    return numbers


def candidates(searches: Mapping[str, Search], folder: str | Path) -> dict[str, Any]:
    """Draws the metric of every candidate for one lambda of all rows against lambda, one panel per metric.

    Figure 8b, c of the paper, for Fixed-D-DDIM and LA-DDIM.

    Args:
      searches: label -> search, such as those of `FittedSolver.search`.

    Returns:
      What the JSON file holds; `searches` has for each label metric, candidates [n], values [n] (null where images were
      not finite) and best.

    Raises:
      ValueError: no searches.
    """
    if not searches:
        raise ValueError("There are no searches. Pass at least one entry {label: search}.")
    found = {}
    for label, search in searches.items():
        order = np.argsort(search.candidates)
        values = [float(v) if np.isfinite(v) else None for v in np.asarray(search.values)[order]]
        facts = {"metric": search.metric, "best": search.best, "at edge": search.at_edge}
        found[label] = {**facts, "candidates": np.asarray(search.candidates)[order], "values": values}
    numbers = plain({"what": CANDIDATES, "searches": found})
    write(folder, "candidates", numbers, partial(line_plot, candidate_panels(numbers)))
    return numbers


def lambda_panels(numbers: Mapping[str, Any]) -> list[dict[str, Panel]]:
    """One panel against the row, one against its level."""
    panels = {}
    for title, xlabel in (("against the row", "row"), ("against its level", AXES["logsnr"])):
        lines = {}
        for label, fit in numbers["fits"].items():
            values = np.array(fit["lambdas"])
            x = np.arange(len(values)) if xlabel == "row" else [np.nan if v is None else v for v in fit["logsnr"]]
            count = values.shape[1]
            for j, y in enumerate(values.T):
                name = label if count == 1 else f"{label}, {j + 1}"
                # Directions of one fit share its colour as long as their dashes tell them apart.
                like, style = (label, STYLES[j]) if count <= len(STYLES) else (None, "-")
                lines[name] = Line(x, y, style, "o", like)
        panels[title] = Panel(lines, xlabel, "lambda", yscale="auto")
    return [panels]


def candidate_panels(numbers: Mapping[str, Any]) -> list[dict[str, Panel]]:
    """One panel for each metric."""
    panels: dict[str, Panel] = {}
    for label, search in numbers["searches"].items():
        values = np.array([np.nan if value is None else value for value in search["values"]])
        panel = panels.setdefault(search["metric"], Panel({}, "lambda", search["metric"], yscale="auto"))
        panels[search["metric"]] = panel._replace(
            lines={**panel.lines, label: Line(search["candidates"], values, "-", "o")}
        )
    return [panels]
