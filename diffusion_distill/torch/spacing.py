"""The levels of a scheduler's steps, where diffusers has them for the same config.

    betas    the indices of `timestep_spacing` (leading, trailing or linspace) as DDIMScheduler has them
    edm      Karras's rule, equal steps in sigma^(1/rho)
    flow     equal steps of sigma, moved by the shift

and then the end: zero noise, or with set_alpha_to_one=False the level of the index 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.torch.conventions import Convention


def grid_of(settings: Mapping[str, Any], convention: Convention, steps: int, mu: float | None = None) -> Level:
    """The grid [steps + 1] of a number of steps.

    Args:
      settings: the config of `DistilledODEScheduler`.
      mu: of a flow whose shift depends on the size of the images.

    Raises:
      ValueError: no steps, more than a model of discrete times has, or an unknown rule.
    """
    positive_int("The number of steps", steps)
    if settings["spacing"]:
        return grids.clean_end(grids.make_grid(convention.process, steps, settings["spacing"], rho=settings["rho"]))
    if settings["family"] == "edm":
        return grids.make_grid(convention.process, steps, "karras", rho=settings["rho"])
    if settings["family"] == "flow":
        return closed(convention.levels_of(shifted(settings, _flow_sigmas(settings, steps), mu)))
    make = choose("timestep_spacing", settings["timestep_spacing"], SPACINGS)
    count = settings["num_train_timesteps"]
    if steps > count:
        raise ValueError(f"{steps} steps were asked for, but the model has {count} timesteps: take at most {count}.")
    times = make(steps, count, settings["steps_offset"])
    levels = convention.levels_told(times)
    _warn_of_signal(settings, levels, times)
    end = None if settings["set_alpha_to_one"] else convention.levels_told([0.0])
    return closed(levels, end)


def _warn_of_signal(settings: Mapping[str, Any], levels: Level, times: np.ndarray) -> None:
    """Warns of a first level that is mostly signal, as that of one step with 'leading' and 'linspace' is."""
    if levels.alpha[0] > levels.sigma[0]:
        warnings.warn(
            f"With timestep_spacing={settings['timestep_spacing']!r} and {len(times)} steps the first timestep is "
            f"{times[0]:g}, where samples are mostly signal, but pipelines begin with pure noise. Give "
            "timestep_spacing='trailing'.",
            stacklevel=4,
        )


def closed(levels: Level, end: Level | None = None) -> Level:
    """Levels [steps], perhaps with their end, as a grid [steps + 1] that ends there, or at zero noise.

    Raises:
      ValueError: there are none, or they do not decrease.
    """
    if not len(levels.sigma):
        raise ValueError("Give at least one timestep or sigma.")
    if levels.sigma[-1] == 0:
        return grids.check(levels)
    zero = end is None or not end.sigma[0] / end.alpha[0] < levels.sigma[-1] / levels.alpha[-1] * (1 - 1e-9)
    last = Level(np.array([1.0]), np.array([0.0])) if zero or end is None else end
    return grids.check(Level(*(np.append(a, b) for a, b in zip(levels, last, strict=True))))


def shifted(settings: Mapping[str, Any], sigmas: Sequence[float] | np.ndarray, mu: float | None) -> np.ndarray:
    """The sigmas of a flow after its shift, which is exp(mu) or mu if it depends on the size of the images.

    Raises:
      ValueError: it does, and mu is missing.
    """
    return _moved(_shift(settings, mu), sigmas)


def unshifted(settings: Mapping[str, Any], sigmas: Sequence[float] | np.ndarray, mu: float | None) -> np.ndarray:
    """The inverse of `shifted`: sigmas of a flow as `sigmas=` takes them, before the shift.

    Raises:
      ValueError: as `shifted`.
    """
    return _moved(1 / _shift(settings, mu), sigmas)


def equal(sigmas: Sequence[float] | np.ndarray) -> bool:
    """Whether sigmas [n] are 1 - k/n: what pipelines of flows, such as Flux's, hand over for n steps.

    Some begin at 0.999 instead of 1.
    """
    return bool(np.allclose(sigmas, 1 - np.arange(len(sigmas)) / len(sigmas), rtol=0, atol=2e-3))


def _shift(settings: Mapping[str, Any], mu: float | None) -> float:
    """The shift of a flow, which is exp(mu) or mu if it depends on the size of the images."""
    if not settings["use_dynamic_shifting"]:
        return settings["shift"]
    if mu is None:
        raise ValueError("The shift of this scheduler depends on the images: give mu (use_dynamic_shifting).")
    return math.exp(mu) if settings["time_shift_type"] == "exponential" else mu


def _moved(shift: float, sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    sigmas = np.asarray(sigmas, np.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _flow_sigmas(settings: Mapping[str, Any], steps: int) -> np.ndarray:
    """Equal steps from 1 to the least sigma, which FlowMatchEulerDiscreteScheduler has shifted once already."""
    least = np.array([1 / settings["num_train_timesteps"]])
    least = least if settings["use_dynamic_shifting"] else shifted(settings, least, None)
    return np.linspace(1.0, least[0], steps)


def _leading(steps: int, count: int, offset: int) -> np.ndarray:
    return np.arange(steps)[::-1] * (count // steps) + offset


def _trailing(steps: int, count: int, offset: int) -> np.ndarray:
    return np.round(np.arange(count, 0, -count / steps))[:steps] - 1


def _linspace(steps: int, count: int, offset: int) -> np.ndarray:
    return np.round(np.linspace(0, count - 1, steps))[::-1]


#: (steps, number of betas, steps_offset) -> indices, decreasing
SPACINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}
