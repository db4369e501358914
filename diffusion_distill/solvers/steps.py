"""One solver step from level to level as a jitted function: DDIM, Heun, midpoint and the classical Runge–Kutta method.

    z = dd.heun_step(denoise, z, start, end)

The rows are those of the tables (solvers/ddim.py, solvers/general/runge_kutta.py), for levels that may differ from
sample to sample and may be traced by JAX, so that a step can stand in a loss or a `lax.scan`. Levels known on the host
(NumPy arrays, numbers) have their coefficients made there in float64, as tables do; those of JAX arrays are computed on
the device, in the precision of the images. Other values of the levels do not recompile.

A step may also go up in noise, which encodes an image. A loop over a whole grid is better left to `dd.sample` or
`engine.integrate`, which also run multistep solvers and draw noise.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import namespace
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise, as_denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.forms import X_HAT, move
from diffusion_distill.solvers.general.runge_kutta import TABLEAUX, Tableau, step
from diffusion_distill.solvers.rows import advance, begin, walk
from diffusion_distill.solvers.table import Table, build, stacked


def ddim_step(denoise: Denoise, z: Data, start: Level, end: Level, cond: Cond | None = None) -> Data:
    """One DDIM step (arXiv:2010.02502 Eq. 12, eta = 0), z_end = r·z + d·x_hat; order 1, one network call.

    Any levels will do. A step to zero noise gives x_hat itself.

    Args:
      denoise: maps (z, level, cond) to x_hat: an artefact's `denoiser()`, another JAX tree that can be called, or a
        plain function (each new function is compiled anew).
      z: [batch, ...], at the level `start`.
      start, end: levels, scalars or [batch]; sigma > 0 at the start, alpha > 0 at the end.
      cond: [batch] int32, for conditional models.

    Returns:
      z at the level `end`, of the shape of z, float32 (float64 if z is, where JAX allows it).

    Raises:
      ValueError: levels of another shape; or, if they are known on the host, of values not allowed.
    """
    return _step(_Method(None), denoise, z, start, end, cond)


def heun_step(denoise: Denoise, z: Data, start: Level, end: Level, cond: Cond | None = None) -> Data:
    """One step of Heun's method, EDM's (arXiv:2206.00364 Algorithm 1); order 2, two network calls.

    The second call is at the level `end`, so any levels with alpha > 0 will do. A step to zero noise is DDIM's, so it
    gives the first call's x_hat; `ddim_step` saves the second call. Arguments, result and errors as in `ddim_step`.
    """
    return _step(_Method(TABLEAUX["heun"]), denoise, z, start, end, cond)


def midpoint_step(
    denoise: Denoise, z: Data, start: Level, end: Level, cond: Cond | None = None, *, process: Process | None = None
) -> Data:
    """One step of the midpoint method in sigma/alpha; order 2, two network calls.

    The second call is half way in sigma/alpha. Where that is, is known of VP (alpha² + sigma² = 1) and VE (alpha = 1)
    levels; of others the process says it. Without one they are refused, or give NaN where they are traced. A step to
    zero noise is DDIM's, as in `heun_step`. Arguments, result and errors as in `ddim_step`.
    """
    return _step(_Method(TABLEAUX["midpoint"], process), denoise, z, start, end, cond)


def rk4_step(
    denoise: Denoise, z: Data, start: Level, end: Level, cond: Cond | None = None, *, process: Process | None = None
) -> Data:
    """One step of the classical Runge–Kutta method in sigma/alpha; order 4, four network calls.

    Calls two and three are half way in sigma/alpha, the fourth is at the level `end`. Levels, a step to zero noise,
    arguments, result and errors as in `midpoint_step`.
    """
    return _step(_Method(TABLEAUX["rk4"], process), denoise, z, start, end, cond)


# --- how a step is made and run


class _Method(NamedTuple):
    """A method as a value, by which compiled steps are told apart: a tableau, None for DDIM; and a process."""

    tableau: Tableau | None
    process: Process | None = None

    def table(self, start: Level, end: Level) -> Table:
        """The table of one step; its numbers are [rows], or [rows, batch] where levels differ from sample to sample."""
        if self.tableau is None:
            levels, rows = [start], [{"y": move(start, end, "x_hat", X_HAT)}]
        else:
            levels, rows = step(start, end, self.tableau, self.process)
        others = dict.fromkeys(name for row in rows for name in row if name != "y")
        return build(stacked(levels), rows, registers=("y", *others))


def _step(method: _Method, denoise: Denoise, z: Data, start: Level, end: Level, cond: Cond | None) -> Data:
    start, end = (_of_shape(name, level, np.shape(z)) for name, level in (("start", start), ("end", end)))
    denoise = as_denoise(denoise)
    if namespace(*start, *end) is not np:
        return _run_traced(method, denoise, z, start, end, cond)
    start, end = _checked(start, end, least_alpha=np.nextafter(0, 1) if method.tableau else 0.0)
    return _run(denoise, z, method.table(start, end), cond)


def _of_shape(name: str, level: Level, shape: tuple[int, ...]) -> Level:
    level = Level(*level)
    if {np.shape(a) for a in level} - {(), shape[:1]}:
        raise ValueError(
            f"The level {name!r} has alpha and sigma of shapes {np.shape(level.alpha)}, {np.shape(level.sigma)}; for z "
            f"of shape {shape} they must be scalars or {shape[:1]}, one for each sample."
        )
    return level


def _checked(start: Level, end: Level, least_alpha: float) -> tuple[Level, Level]:
    """Levels on the host in float64; raises ValueError if there is no step between them."""
    start, end = (Level(*(np.asarray(a, np.float64) for a in level)) for level in (start, end))
    finite = all(np.isfinite(a).all() for a in (*start, *end))
    alphas = all((level.alpha >= least_alpha).all() for level in (start, end))
    if not (finite and alphas and (start.sigma > 0).all() and (end.sigma >= 0).all()):
        alpha = "alpha > 0 (ddim_step takes 0 too)" if least_alpha else "alpha >= 0"
        raise ValueError(
            f"A step needs finite levels with {alpha}, sigma >= 0, and sigma > 0 at its start; got, as (alpha, sigma), "
            f"{tuple(a.tolist() for a in start)} and {tuple(a.tolist() for a in end)}."
        )
    return start, end


@partial(jax.jit, static_argnums=0)
def _run_traced(method: _Method, denoise: Denoise, z: Data, start: Level, end: Level, cond: Cond | None) -> Data:
    start, end = jax.tree.map(lambda a: jnp.asarray(a, _dtype(z)), (start, end))
    return _run(denoise, z, method.table(start, end), cond)


@jax.jit
def _run(denoise: Denoise, z: Data, table: Table, cond: Cond | None) -> Data:
    z, table = jax.tree.map(lambda a: jnp.asarray(a, _dtype(z)), (z, table))
    *_, (registers, _, _) = walk(partial(advance, denoise, cond), table, begin(table, z))
    return registers[0]


def _dtype(z: Data) -> Any:
    """The precision of a step: float32, also for images of fewer bits, or float64."""
    return jnp.float64 if jnp.result_type(z) == jnp.float64 else jnp.float32
