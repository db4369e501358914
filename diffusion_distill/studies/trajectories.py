"""Along the way of a solver: how long state, x_hat and eps are at each level, and the way of some pixels.

A figure of the analysis in D-ODE's paper, arXiv:2309.16421:

FOLDER/trajectories.png    norms, and the values of some pixels of the first sample
FOLDER/trajectories.json   what is drawn, row by row, and what is what

    norm    mean over samples of ‖y_k‖, ‖x_hat_k‖ and ‖eps_k‖
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.report import Line, Panel, line_plot
from diffusion_distill.solvers.table import Table
from diffusion_distill.studies.subject import check, finite, lengths, numbers_of, run, told, write
from diffusion_distill.training import sharding

#: What trajectories can be drawn against -> the label of the axis.
AXES = {"logsnr": "level (logsnr)", "fraction": "fraction of the rows"}
MARKED = 30  # lines of at most so many points show them
WIDE_PIXELS = 10.0  # beyond any noise of VP levels; clean pixels are in [-1, 1]
#: What the numbers of the file are.
WHAT = {
    "images": "how many, each from its own noise, the same for all tables",
    "shape": "of an image: height, width, channels",
    "places": "of the pixels: row, column, channel",
    "nfe": "network evaluations, one per row of the table",
    "logsnr": "2·log(alpha / sigma) of the level that the network is told in each row",
    "state": "mean L2 norm of what the network sees in each row, and of the result",
    "x_hat": "mean L2 norm of the network's output, read as the clean image",
    "eps": "mean L2 norm of the network's output, read as the noise",
    "pixels": "of the first image in each row's state and in the result, one list for each place",
}


def trajectories(
    denoise: Denoise,
    tables: Mapping[str, Table],
    start: Data,
    folder: str | Path,
    cond: Cond | None = None,
    pixels: int = 4,
    axis: str = "logsnr",
) -> dict[str, Any]:
    """Norms along the trajectories of solvers, and the values of the pixels of the first image that vary most.

    All states and outputs of one table at a time are kept, 2·nfe times `start`.

    Args:
      tables: label -> solver on its grid, without noise of its own.
      start: unit noise [batch, ...].
      cond: conditions [batch, ...], for conditional models.
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
    check(tables, start)
    shape, pixels = start.shape[1:], positive_int("The number of pixels", pixels)
    if pixels > np.prod(shape):
        raise ValueError(f"An image of shape {shape} has {np.prod(shape)} values; got pixels={pixels}.")
    found = {label: _walk(denoise, label, table, start, cond) for label, table in tables.items()}
    decided = max((walk.pop("outputs") for walk in found.values()), key=len)
    chosen = np.argsort(-decided.std(axis=0), axis=None, kind="stable")[:pixels]
    places = np.unravel_index(chosen, shape)
    for walk in found.values():
        walk["pixels"] = walk.pop("states")[:, *places].T
    numbers = numbers_of(WHAT, start, tables, found, shape=list(shape), places=np.stack(places, axis=1))
    write(folder, "trajectories", numbers, partial(line_plot, trajectory_panels(numbers, axis)))
    return numbers


def _walk(denoise: Denoise, label: str, table: Table, start: Data, cond: Cond | None) -> dict[str, np.ndarray]:
    """Mean norms of states [nfe + 1] and outputs [nfe]; states [nfe + 1, ...] and outputs [nfe, ...] of one image."""
    states, outputs = run(denoise, table, start, cond)
    walk = jax.tree.map(sharding.fetch, _norms(states, outputs, told(table)))
    return {name: finite(label, values) for name, values in walk.items()}


@jax.jit
def _norms(states: Data, outputs: Data, level: Level) -> dict[str, Array]:
    eps = eps_from_x(states[:-1], outputs, level)
    kinds = {"state": states, "x_hat": outputs, "eps": eps}
    norms = {name: lengths(values).mean(axis=1) for name, values in kinds.items()}
    return norms | {"states": states[:, 0], "outputs": outputs[:, 0]}


def trajectory_panels(numbers: Mapping[str, Any], axis: str) -> list[dict[str, Panel]]:
    """A row of panels of norms and one of pixels. Results, whose level may be infinite, stand at the right."""
    tables = numbers["tables"]
    if axis == "logsnr":
        known = [value for table in tables.values() for value in table["logsnr"] if value is not None]
        apart = 0.08 * max(np.ptp(known), 1.0)
        end, begin = float(max(known) + apart), float(min(known) - apart)  # where there is no noise, and no signal
        x = {label: [begin if v is None else v for v in table["logsnr"]] for label, table in tables.items()}
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
    for k, (*place, channel) in enumerate(numbers["places"]):
        title = f"pixel ({', '.join(map(str, place))})" + (f", channel {channel}" if numbers["shape"][-1] > 1 else "")
        values = {label: table["pixels"][k] for label, table in tables.items()}
        paths[title] = panel(values, "asinh" if widest > WIDE_PIXELS else "linear")
    return [norms, paths]
