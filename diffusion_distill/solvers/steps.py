"""One solver step from level to level as a jitted function: DDIM, Heun, midpoint and the classical Runge–Kutta method.

    z = dd.heun_step(denoise, z, start, end)

The rows are those of the tables (solvers/ddim.py, solvers/runge_kutta.py), for levels that may differ from sample to
sample and may be traced by JAX, so that a step can stand in a loss or a `lax.scan`. Levels known on the host (NumPy
arrays, numbers) have their coefficients made there in float64, as tables do; those of JAX arrays are computed on the
device, in the precision of the images. Other values of the levels do not recompile.

A step may also go up in noise, which encodes an image. A loop over a whole grid is better left to `dd.sample` or
`sampling.integrate`, which also run multistep solvers and draw noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.typing import Cond, Image
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.engine import combine
from diffusion_distill.solvers.forms import X_HAT, move
from diffusion_distill.solvers.runge_kutta import TABLEAUX, Tableau, check_between, step


def ddim_step(denoise: Denoise, z: Image, start: Level, end: Level, cond: Cond | None = None) -> Image:
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
    return _step(_ddim, denoise, z, start, end, cond)


def heun_step(denoise: Denoise, z: Image, start: Level, end: Level, cond: Cond | None = None) -> Image:
    """One step of Heun's method, EDM's (arXiv:2206.00364 Algorithm 1); order 2, two network calls.

    The second call is at the level `end`, so any levels with alpha > 0 will do. A step to zero noise is DDIM's, so it
    gives the first call's x_hat; `ddim_step` saves the second call. Arguments, result and errors as in `ddim_step`.
    """
    return _step(_heun, denoise, z, start, end, cond)


def midpoint_step(denoise: Denoise, z: Image, start: Level, end: Level, cond: Cond | None = None) -> Image:
    """One step of the midpoint method in sigma/alpha; order 2, two network calls.

    The second call is half way in sigma/alpha, at a level between the two, so these must be VP (alpha² + sigma² = 1) or
    VE (alpha = 1); others are refused, or give NaN where they are traced. A step to zero noise is DDIM's, as in
    `heun_step`. Arguments, result and errors as in `ddim_step`.
    """
    return _step(_midpoint, denoise, z, start, end, cond)


def rk4_step(denoise: Denoise, z: Image, start: Level, end: Level, cond: Cond | None = None) -> Image:
    """One step of the classical Runge–Kutta method in sigma/alpha; order 4, four network calls.

    Calls two and three are half way in sigma/alpha, the fourth is at the level `end`. Levels, a step to zero noise,
    arguments, result and errors as in `midpoint_step`.
    """
    return _step(_rk4, denoise, z, start, end, cond)


# --- how a step is made and run

Rows = tuple[list[Level], list[dict[str, Any]]]  # what the network is told in each stage, and the row after it
Method = Callable[[Level, Level], Rows]


def _ddim(start: Level, end: Level) -> Rows:
    return [start], [{"y": move(start, end, "x_hat", X_HAT)}]


def _runge_kutta(tableau: Tableau, start: Level, end: Level) -> Rows:
    return step(start, end, tableau)


_heun, _midpoint, _rk4 = (partial(_runge_kutta, TABLEAUX[name]) for name in ("heun", "midpoint", "rk4"))


def _step(method: Method, denoise: Denoise, z: Image, start: Level, end: Level, cond: Cond | None) -> Image:
    start, end = (_of_shape(name, level, np.shape(z)) for name, level in (("start", start), ("end", end)))
    if jax.tree_util.all_leaves([denoise]):
        denoise = jax.tree_util.Partial(denoise)  # a plain function has no arrays to trace
    if namespace(*start, *end) is not np:
        return _run_traced(method, denoise, z, start, end, cond)
    start, end = _checked(start, end, least_alpha=0.0 if method is _ddim else np.nextafter(0, 1))
    levels, rows = _made(method, start, end)
    for level in levels:
        check_between(level)
    return _run(denoise, z, levels, rows, cond)


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


def _made(method: Method, start: Level, end: Level) -> Rows:
    """The method's rows as plain dictionaries, which are JAX trees."""
    levels, rows = method(start, end)
    return levels, [{name: dict(form) for name, form in row.items()} for row in rows]


@partial(jax.jit, static_argnums=0)
def _run_traced(method: Method, denoise: Denoise, z: Image, start: Level, end: Level, cond: Cond | None) -> Image:
    start, end = jax.tree.map(lambda a: jnp.asarray(a, _dtype(z)), (start, end))
    return _run(denoise, z, *_made(method, start, end), cond)


@jax.jit
def _run(
    denoise: Denoise, z: Image, levels: list[Level], rows: list[dict[str, dict[str, Array]]], cond: Cond | None
) -> Image:
    z, levels, rows = jax.tree.map(lambda a: jnp.asarray(a, _dtype(z)), (z, levels, rows))
    values = {"y": z}
    for level, row in zip(levels, rows, strict=True):
        told = Level(*(jnp.broadcast_to(a, z.shape[:1]) for a in level))
        values["x_hat"] = denoise(values["y"], told, cond)
        new = {name: combine(list(form.values()), [values[j] for j in form]) for name, form in row.items()}
        values.update(new)
    return values["y"]


def _dtype(z: Image) -> Any:
    """The precision of a step: float32, also for images of fewer bits, or float64."""
    return jnp.float64 if jnp.result_type(z) == jnp.float64 else jnp.float32
