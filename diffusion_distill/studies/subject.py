"""What the studies share: whom they look at, how a table is run, and how numbers are written.

All tables of a study start from the same noise. y_k is the network's input in row k of a table, at the level
(alpha_k, sigma_k) that the network is given, and eps_k = (y_k - alpha_k·x_hat_k) / sigma_k. Near zero noise eps is a
small difference divided by sigma: an error of about 1e-7 / sigma in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_distill.api.sampling import TEACHER_STEPS, denoiser_of, sample_keys, table_for
from diffusion_distill.base.arrays import Array
from diffusion_distill.base.files import user_path
from diffusion_distill.base.seeds import key_of
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.base.whole import whole
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers import engine
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.spec import SamplerSpec
from diffusion_distill.solvers.table import Table
from diffusion_distill.training import sharding
from diffusion_distill.training.artefact import Artefact

#: A solver is shown beside DDIM with so many times its evaluations.
FINE = 10
DIGITS = 7  # of the numbers written, as many as float32 has


class Subject(NamedTuple):
    """The model, solvers and noise of a study: the first arguments of `trajectories` and `similarity`."""

    denoise: Denoise
    tables: Mapping[str, Table]
    start: Data
    cond: Cond | None


def subject(
    artefact: Artefact,
    spec: SamplerSpec | None = None,
    *,
    count: int = 64,
    seed: int = 0,
    mesh: Mesh | None = None,
    **fields: Any,
) -> Subject:
    """A solver, with a fitted one its D-ODE variant, and DDIM in ten times its evaluations; their noise.

    Args:
      spec, fields: as in `api.sample`; of a fitted solver, solver and grid are the file's.
      count: samples.
      mesh: the devices, see `api.sampling.denoiser_of`; by default as many as the samples can be split over.

    Raises:
      ValueError: a count that a given mesh does not divide.
    """
    spec = SamplerSpec.of(spec, **fields)
    found = FittedSolver.load(spec.fitted) if isinstance(spec.fitted, str | Path) and spec.fitted else spec.fitted
    if found:
        name, base = found.solver, found.base.plain()
    else:
        spec = spec.complete(artefact.steps or TEACHER_STEPS)
        name, base = spec.solver, table_for(artefact, spec.steps, spec.solver, spacing=spec.spacing, end=spec.end)
    tables = {f"{name}, {base.nfe} NFE": base}
    if found:
        tables[f"D-{name}, {base.nfe} NFE"] = found.table()
    fine = FINE * base.nfe
    tables[f"ddim, {fine} NFE"] = table_for(artefact, fine, "ddim", spacing=spec.spacing, end=spec.end)
    mesh = mesh or sharding.data_mesh(sharding.devices_for(count))
    sharding.check_batch(count, mesh)
    keys = sample_keys(key_of(seed), np.arange(count), sharding.split(mesh))
    cond = conditions.for_samples(artefact.model, count, None, seed)
    here = None if cond is None else jax.device_put(cond, sharding.split(mesh))
    start = engine.noise(keys, 0, artefact.model.shape)
    return Subject(denoiser_of(artefact, spec, mesh), tables, start, here)


def check(tables: Mapping[str, Table], start: Data) -> None:
    """Raises ValueError if there is nothing to look at, or a table draws noise of its own."""
    if not tables:
        raise ValueError("There are no tables. Pass at least one entry {label: table}.")
    if start.ndim < 2:
        raise ValueError(f"start must be noise [batch, ...], got shape {start.shape}.")
    for label, table in tables.items():
        if not table.deterministic:
            raise ValueError(
                f"Table {label!r} draws noise of its own, so its way is not decided by where it starts. "
                "Choose a deterministic solver."
            )


def run(denoise: Denoise, table: Table, start: Data, cond: Cond | None) -> tuple[Data, Data]:
    """States [nfe + 1, batch, ...] and outputs x_hat [nfe, batch, ...] of all rows."""
    rows = range(table.nfe)
    return engine.trajectory(denoise, table, start, cond, states=[*rows, table.nfe], outputs=rows)[1:]


def lengths(values: Data) -> Array:
    """L2 norms of samples [rows, batch, ...]: [rows, batch]."""
    return jnp.sqrt((values**2).sum(axis=tuple(range(2, values.ndim))))


def told(table: Table) -> Level:
    """The levels [nfe] that the network is given."""
    return Level(*(np.asarray(part, np.float32) for part in table.level))


def _logsnr(table: Table) -> np.ndarray:
    return Level(*(np.asarray(part, np.float64) for part in table.level)).logsnr


def finite(label: str, values: np.ndarray) -> np.ndarray:
    """The values, if they are finite; raises ValueError otherwise."""
    if not np.isfinite(values).all():
        raise ValueError(f"{label!r} has values that are not finite, so there is nothing to show. Check the model.")
    return values


def numbers_of(
    what: Mapping[str, str],
    start: Data,
    tables: Mapping[str, Table],
    found: Mapping[str, Mapping[str, np.ndarray]],
    **facts: Any,
) -> dict[str, Any]:
    """The contents of the JSON file of an analysis of tables."""
    known = {label: {"nfe": table.nfe, "logsnr": _logsnr(table)} for label, table in tables.items()}
    rows = {label: known[label] | dict(found[label]) for label in tables}
    return plain({"what": dict(what), "images": int(start.shape[0]), **facts, "tables": rows})


def plain(value: Any) -> Any:
    """Converts values for JSON: arrays become lists, numbers keep their significant digits, infinite ones are null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
    return value


def write(folder: str | Path, name: str, numbers: Mapping[str, Any], draw: Any) -> None:
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
