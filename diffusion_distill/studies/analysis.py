"""Looking at solvers: the figures of the analysis in D-ODE's paper, arXiv:2309.16421, each with its numbers beside it.

FOLDER/trajectories.png   how long state, x_hat and eps are at each level, and the way of some pixels of the first image
FOLDER/similarity.png     how alike the network's outputs of any two rows are
FOLDER/lambdas.png        fitted lambdas against row and level
FOLDER/candidates.png     what each candidate for one lambda was worth
FOLDER/<the same>.json    what is drawn, row by row, and what is what

    norm         mean over images of ‖y_k‖, ‖x_hat_k‖ and ‖eps_k‖
    similarity   S_kl = mean over images of <d_k, d_l> / (‖d_k‖·‖d_l‖), d = eps or x_hat

y_k is the network's input in row k of a table, at the level (alpha_k, sigma_k) that the network is given, and
eps_k = (y_k - alpha_k·x_hat_k) / sigma_k.
All tables start from the same noise. Near zero noise eps is a small difference divided by sigma: an error of about
1e-7 / sigma in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from diffusion_distill.api.sampling import TEACHER_STEPS, denoiser_of, labels_for, sample_keys, table_for
from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.base.files import user_path
from diffusion_distill.base.seeds import key_of
from diffusion_distill.base.typing import Image, Labels
from diffusion_distill.base.whole import whole
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.report import Line, Panel, heat_maps, line_plot
from diffusion_distill.solvers import engine
from diffusion_distill.solvers.dode import Search
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.table import Table
from diffusion_distill.training import sharding
from diffusion_distill.training.artefact import Artefact

#: A solver is shown beside DDIM with so many times its evaluations.
FINE = 10
#: What the network's output can be read as.
OUTPUTS = {"eps": "eps", "x_hat": "x_hat"}
#: What trajectories can be drawn against -> the label of the axis.
AXES = {"logsnr": "level (logsnr)", "fraction": "fraction of the rows"}
MARKED = 30  # lines of at most so many points show them
WIDE_PIXELS = 10.0  # beyond any noise of VP levels; clean pixels are in [-1, 1]
STYLES = ("-", "--", ":", "-.")
DIGITS = 7  # of the numbers written, as many as float32 has


class Subject(NamedTuple):
    """The model, solvers and noise of an analysis: the first arguments of `trajectories` and `similarity`."""

    denoise: Denoise
    tables: Mapping[str, Table]
    start: Image
    labels: Labels | None


def subject(
    artefact: Artefact,
    *,
    solver: str = "ddim",
    steps: int | None = None,
    spacing: str = "",
    end: float = 0.0,
    fitted: str = "",
    clip: bool = True,
    guidance: Mapping[str, Any] | None = None,
    count: int = 64,
    seed: int = 0,
) -> Subject:
    """A solver, with `fitted` its D-ODE variant in that file, and DDIM in ten times its evaluations; their noise.

    Args:
      artefact and the others: as in `runs.sample`; of a fitted solver, solver and grid are the file's.
      count: images.
    """
    steps, found = steps or artefact.steps or TEACHER_STEPS, FittedSolver.load(fitted) if fitted else None
    if found:
        solver, base = found.solver, found.base.plain()
    else:
        base = table_for(artefact, steps, solver, spacing=spacing, end=end)
    tables = {f"{solver}, {base.nfe} NFE": base}
    if found:
        tables[f"D-{solver}, {base.nfe} NFE"] = found.table()
    fine = FINE * base.nfe
    tables[f"ddim, {fine} NFE"] = table_for(artefact, fine, spacing=spacing, end=end)
    mesh = sharding.data_mesh(sharding.devices_for(count))
    keys = sample_keys(key_of(seed), np.arange(count), sharding.split(mesh))
    labels = labels_for(artefact.model, count, None, seed)
    here = None if labels is None else jax.device_put(labels, sharding.split(mesh))
    start = engine.noise(keys, 0, artefact.model.shape)
    return Subject(denoiser_of(artefact, clip, guidance, mesh), tables, start, here)


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
    files = [file for file in sorted(path.glob("*.json")) if file.stem not in WHAT] if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"The folder {path} holds no fitted solver. --mode=fit and --mode=solvers write them.")
    found = {file: FittedSolver.load(file) for file in files}
    return {
        f"D-{fit.solver}, {fit.base.nfe} NFE{'' if len(files) == 1 else f' ({file.stem})'}": fit
        for file, fit in found.items()
    }


def trajectories(
    denoise: Denoise,
    tables: Mapping[str, Table],
    start: Image,
    folder: str | Path,
    labels: Labels | None = None,
    pixels: int = 4,
    axis: str = "logsnr",
) -> dict[str, Any]:
    """Norms along the trajectories of solvers, and the values of the pixels of the first image that vary most.

    All states and outputs of one table at a time are kept, 2·nfe times `start`.

    Args:
      tables: label -> solver on its grid, without noise of its own.
      start: unit noise [batch, height, width, channels].
      labels: [batch] int32, for conditional models.
      pixels: how many pixels, those about which the network changes its mind: whose x_hat has the greatest standard
        deviation over the rows of the longest table.
      axis: what to draw against, 'logsnr' (of the row's level) or 'fraction' (of the rows behind it).

    Returns:
      What the JSON file holds; `tables` has for each label nfe, logsnr [nfe], state [nfe + 1] (the last is the result),
      x_hat [nfe], eps [nfe], and pixels [pixels][nfe + 1].

    Raises:
      ValueError: no tables, one that draws noise, an unknown axis, more pixels than an image has, values that are not
        finite.
      Interrupted: the program was asked to stop.
    """
    choose("axis", axis, AXES)
    _check(tables, start)
    shape, pixels = start.shape[1:], positive_int("The number of pixels", pixels)
    if pixels > np.prod(shape):
        raise ValueError(f"An image of shape {shape} has {np.prod(shape)} values; got pixels={pixels}.")
    found = {label: _walk(denoise, label, table, start, labels) for label, table in tables.items()}
    decided = max((walk.pop("outputs") for walk in found.values()), key=len)
    chosen = np.argsort(-decided.std(axis=0), axis=None, kind="stable")[:pixels]
    places = np.unravel_index(chosen, shape)
    for walk in found.values():
        walk["pixels"] = walk.pop("states")[:, *places].T
    numbers = _numbers("trajectories", start, tables, found, shape=list(shape), places=np.stack(places, axis=1))
    _write(folder, "trajectories", numbers, partial(line_plot, _trajectory_panels(numbers, axis)))
    return numbers


def similarity(
    denoise: Denoise,
    tables: Mapping[str, Table],
    start: Image,
    folder: str | Path,
    labels: Labels | None = None,
    output: str = "eps",
) -> dict[str, Any]:
    """Cosine similarities between the network's outputs of all pairs of rows, averaged over the images.

    Args:
      tables, start, labels: as in `trajectories`.
      output: what the network's output is read as, 'eps' or 'x_hat'.

    Returns:
      What the JSON file holds; `tables` has for each label nfe, logsnr [nfe] and similarity [nfe][nfe].

    Raises:
      ValueError: an unknown output, no tables, one that draws noise, or values that are not finite.
      Interrupted: the program was asked to stop.
    """
    choose("output", output, OUTPUTS)
    _check(tables, start)
    found = {}
    for label, table in tables.items():
        states, outputs = _run(denoise, table, start, labels)
        matrix = sharding.fetch(_similarity(states, outputs, _told(table), output))
        found[label] = {"similarity": _finite(label, matrix)}
    numbers = _numbers("similarity", start, tables, found, output=output)
    maps = {label: table["similarity"] for label, table in numbers["tables"].items()}
    draw = partial(heat_maps, maps, axis="row", quantity=f"cosine similarity of {output}")
    _write(folder, "similarity", numbers, draw)
    return numbers


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
        found[label] = {"rows": len(values), "logsnr": _finite(label, logsnr), "lambdas": _finite(label, values)}
    numbers = _plain({"what": WHAT["lambdas"], "fits": found})
    _write(folder, "lambdas", numbers, partial(line_plot, _lambda_panels(numbers)))
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
    numbers = _plain({"what": WHAT["candidates"], "searches": found})
    _write(folder, "candidates", numbers, partial(line_plot, _candidate_panels(numbers)))
    return numbers


#: What the numbers of each file are.
WHAT = {
    "trajectories": {
        "images": "how many, each from its own noise, the same for all tables",
        "shape": "of an image: height, width, channels",
        "places": "of the pixels: row, column, channel",
        "nfe": "network evaluations, one per row of the table",
        "logsnr": "2·log(alpha / sigma) of the level that the network is told in each row",
        "state": "mean L2 norm of what the network sees in each row, and of the result",
        "x_hat": "mean L2 norm of the network's output, read as the clean image",
        "eps": "mean L2 norm of the network's output, read as the noise",
        "pixels": "of the first image in each row's state and in the result, one list for each place",
    },
    "similarity": {
        "images": "how many are averaged, each from its own noise, the same for all tables",
        "output": "what the network's output is read as",
        "nfe": "network evaluations, one per row of the table",
        "logsnr": "2·log(alpha / sigma) of the level that the network is told in each row",
        "similarity": "mean cosine of the angle between the outputs of two rows",
    },
    "lambdas": {
        "rows": "network evaluations",
        "logsnr": "2·log(alpha / sigma) of the level that the network is told in each row",
        "lambdas": "in the paper's convention, for each row one per direction; 0 where a row has no direction",
    },
    "candidates": {
        "metric": "by which the best was chosen",
        "candidates": "the lambdas that were tried, one for all rows, in the paper's convention",
        "values": "of the metric",
        "at edge": "whether the best is the least or the greatest candidate",
    },
}


def _check(tables: Mapping[str, Table], start: Image) -> None:
    if not tables:
        raise ValueError("There are no tables. Pass at least one entry {label: table}.")
    if start.ndim != 4:
        raise ValueError(f"start must be noise [batch, height, width, channels], got shape {start.shape}.")
    for label, table in tables.items():
        if not table.deterministic:
            raise ValueError(
                f"Table {label!r} draws noise of its own, so its way is not decided by where it starts. "
                "Choose a deterministic solver."
            )


def _run(denoise: Denoise, table: Table, start: Image, labels: Labels | None) -> tuple[Image, Image]:
    """States [nfe + 1, batch, ...] and outputs x_hat [nfe, batch, ...] of all rows."""
    rows = range(table.nfe)
    return engine.trajectory(denoise, table, start, labels, states=[*rows, table.nfe], outputs=rows)[1:]


def _walk(denoise: Denoise, label: str, table: Table, start: Image, labels: Labels | None) -> dict[str, np.ndarray]:
    """Mean norms of states [nfe + 1] and outputs [nfe]; states [nfe + 1, ...] and outputs [nfe, ...] of one image."""
    states, outputs = _run(denoise, table, start, labels)
    walk = jax.tree.map(sharding.fetch, _norms(states, outputs, _told(table)))
    return {name: _finite(label, values) for name, values in walk.items()}


@jax.jit
def _norms(states: Image, outputs: Image, level: Level) -> dict[str, Array]:
    eps = eps_from_x(states[:-1], outputs, level)
    kinds = {"state": states, "x_hat": outputs, "eps": eps}
    norms = {name: _lengths(values).mean(axis=1) for name, values in kinds.items()}
    return norms | {"states": states[:, 0], "outputs": outputs[:, 0]}


@partial(jax.jit, static_argnames="output")
def _similarity(states: Image, outputs: Image, level: Level, output: str) -> Array:
    """[nfe, nfe]; an output that is 0 everywhere is like no other, and not like itself."""
    values = eps_from_x(states[:-1], outputs, level) if output == "eps" else outputs
    norms = _lengths(values)[:, :, None, None, None]
    unit = values / jnp.where(norms == 0, 1.0, norms)
    # Accelerators round the operands of products unless they are told not to.
    sums = jnp.einsum("kbhwc,lbhwc->kl", unit, unit, precision=jax.lax.Precision.HIGHEST)
    return sums / values.shape[1]


def _lengths(values: Image) -> Array:
    """L2 norms of images [rows, batch, h, w, c]: [rows, batch]."""
    return jnp.sqrt((values**2).sum(axis=(2, 3, 4)))


def _told(table: Table) -> Level:
    return Level(*(np.asarray(part, np.float32) for part in table.level))


def _logsnr(table: Table) -> np.ndarray:
    return Level(*(np.asarray(part, np.float64) for part in table.level)).logsnr


def _finite(label: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"{label!r} has values that are not finite, so there is nothing to show. Check the model.")
    return values


def _numbers(
    name: str, start: Image, tables: Mapping[str, Table], found: Mapping[str, Mapping[str, np.ndarray]], **facts: Any
) -> dict[str, Any]:
    """The contents of the JSON file of an analysis of tables."""
    known = {label: {"nfe": table.nfe, "logsnr": _logsnr(table)} for label, table in tables.items()}
    rows = {label: known[label] | dict(found[label]) for label in tables}
    return _plain({"what": WHAT[name], "images": int(start.shape[0]), **facts, "tables": rows})


def _plain(value: Any) -> Any:
    """Converts values for JSON: arrays become lists, and numbers keep their significant digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _write(folder: str | Path, name: str, numbers: Mapping[str, Any], draw: Any) -> None:
    """FOLDER/<name>.json and .png, by the first process only."""
    if jax.process_index() != 0:
        return
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[[^\[\]\"]*\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers, one line
    with whole(folder / f"{name}.json") as half:
        half.write_text(text + "\n", encoding="utf-8")
    draw(folder / f"{name}.png")


def _trajectory_panels(numbers: Mapping[str, Any], axis: str) -> list[dict[str, Panel]]:
    """A row of panels of norms and one of pixels. Results, whose level may be infinite, stand at the right."""
    tables = numbers["tables"]
    if axis == "logsnr":
        x = {label: table["logsnr"] for label, table in tables.items()}
        told = np.concatenate(list(x.values()))
        end = float(told.max() + 0.08 * max(np.ptp(told), 1.0))
    else:
        x, end = {label: list(np.arange(table["nfe"]) / table["nfe"]) for label, table in tables.items()}, 1.0

    def panel(values: Mapping[str, list[float]], yscale: str) -> Panel:
        lines = {
            label: Line([*x[label], end][: len(y)], y, marker="." if len(y) <= MARKED else "")
            for label, y in values.items()
        }
        return Panel(lines, AXES[axis], yscale=yscale, linear=1.0, marks={"result": end})

    norms, paths = {}, {}
    for name in ("state", "x_hat", "eps"):
        norms[f"norm of {name}"] = panel({label: table[name] for label, table in tables.items()}, "auto")
    widest = max(np.abs(table["pixels"]).max() for table in tables.values())
    for k, (row, column, channel) in enumerate(numbers["places"]):
        title = f"pixel ({row}, {column})" + (f", channel {channel}" if numbers["shape"][-1] > 1 else "")
        values = {label: table["pixels"][k] for label, table in tables.items()}
        paths[title] = panel(values, "asinh" if widest > WIDE_PIXELS else "linear")
    return [norms, paths]


def _lambda_panels(numbers: Mapping[str, Any]) -> list[dict[str, Panel]]:
    """One panel against the row, one against its level."""
    panels = {}
    for title, xlabel in (("against the row", "row"), ("against its level", AXES["logsnr"])):
        lines = {}
        for label, fit in numbers["fits"].items():
            values = np.array(fit["lambdas"])
            x = np.arange(len(values)) if xlabel == "row" else fit["logsnr"]
            count = values.shape[1]
            for j, y in enumerate(values.T):
                name = label if count == 1 else f"{label}, {j + 1}"
                # Directions of one fit share its colour as long as their dashes tell them apart.
                like, style = (label, STYLES[j]) if count <= len(STYLES) else (None, "-")
                lines[name] = Line(x, y, style, "o", like)
        panels[title] = Panel(lines, xlabel, "lambda", yscale="auto")
    return [panels]


def _candidate_panels(numbers: Mapping[str, Any]) -> list[dict[str, Panel]]:
    """One panel for each metric."""
    panels: dict[str, Panel] = {}
    for label, search in numbers["searches"].items():
        values = np.array([np.nan if value is None else value for value in search["values"]])
        panel = panels.setdefault(search["metric"], Panel({}, "lambda", search["metric"], yscale="auto"))
        panels[search["metric"]] = panel._replace(
            lines={**panel.lines, label: Line(search["candidates"], values, "-", "o")}
        )
    return [panels]
