"""Schedulers of the library diffusers (Hugging Face) for our models, as scheduler_config.json describes them.

diffusers tells a network a whole number i of 0, 1, ... N - 1, and looks alpha² of that step up in a table. A model fits
if its network is told its process's time, factor·t + offset (`TimeOfProcess`): i then belongs to t = (i - offset) /
factor, and the table has alpha² at these times. Networks that are told logsnr or log sigma do not fit. Consistency
models (arXiv:2303.01469) have a scheduler of their own.

With `timestep_spacing` 'trailing' and `set_alpha_to_one`, DDIMScheduler takes the levels of our grid 'time' if its
steps divide N, and its last step returns x_hat, as ours does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import predictions
from diffusion_distill.process.levels import Level
from diffusion_distill.process.time_input import EDMInput, TimeOfProcess
from diffusion_distill.process.ve import VE
from diffusion_distill.process.vp_discrete import BETAS, SCHEDULES, Discrete, DiscreteBetas, without_last_signal
from diffusion_distill.weights.matching import WeightsError
from diffusion_distill.weights.torch_models import MOST_STEPS

#: Our predictions -> diffusers' names.
NAMES = {ours: theirs for theirs, ours in predictions.PREDICTED.items()}
#: Rules of betas that DDIMScheduler computes itself, as diffusers calls them.
RULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
#: The largest difference between a level of a student and a level of the scheduler, in alpha².
CLOSE = 1e-6


def config_of(model: Model, grid: Level | None = None) -> dict[str, Any]:
    """The scheduler with which diffusers computes what a model does.

    Args:
      grid: a student's levels [steps + 1], which the scheduler must take too; None for a teacher.

    Raises:
      WeightsError: none does; the message says why.
    """
    if model.prediction == "consistency":
        return _consistency(model)
    if model.prediction not in NAMES:
        raise WeightsError(
            f"The model predicts {model.prediction!r}; diffusers' DDIMScheduler knows {', '.join(NAMES)}. Export it as "
            "safetensors."
        )
    alpha2 = _alpha2(model)
    if grid is not None:
        _check_grid(alpha2, grid)
    low, high = model.data_range or (0.0, 0.0)
    clip = {"clip_sample": True, "clip_sample_range": high} if -low == high > 0 else {"clip_sample": False}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(alpha2),
        **_betas(model, alpha2),
        "prediction_type": NAMES[model.prediction],
        **clip,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }


def _consistency(model: Model) -> dict[str, Any]:
    process, told = model.process, model.time_input
    if not (isinstance(process, VE) and isinstance(told, EDMInput) and told.factor == 1000):
        raise WeightsError(
            "diffusers knows consistency models of the process VE that are told 250·log(sigma), by "
            f"EDMInput(factor=1000); this one has {process} and {told}. Export it as safetensors."
        )
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 40,
        "sigma_min": predictions.SIGMA_IDENTITY,
        "sigma_max": process.sigma_max,
        "sigma_data": told.sigma_data,
        "rho": 7.0,
        "s_noise": 1.0,
        "clip_denoised": model.data_range == (-1.0, 1.0),
    }


def _alpha2(model: Model) -> np.ndarray:
    """alpha² [N] where the network is told 0, 1, ... N - 1, float64."""
    told, process = model.time_input, model.process
    if not isinstance(told, TimeOfProcess):
        raise WeightsError(
            f"The network is told numbers of {told}, but diffusers tells networks the index of a step, a whole number. "
            "That fits only networks that are told the time of their process, TimeOfProcess ('t' in configs). Export "
            "it as safetensors."
        )
    if not (1 <= told.factor <= MOST_STEPS and -1 <= told.offset <= 0):
        raise WeightsError(
            f"diffusers tells networks 0, 1, ... N - 1 with N of at most {MOST_STEPS}; by {told} these are not the "
            "times from 0 to 1. Export it as safetensors."
        )
    times = (np.arange(int(told.factor + 1e-6)) - told.offset) / told.factor
    if isinstance(process, Discrete):
        knots = times * process.count
        if not len(knots) or np.abs(knots - np.round(knots)).max() > 1e-6 or np.round(knots[0]) < 1:
            raise WeightsError(
                f"The whole numbers that diffusers tells the network are, by {told}, not the {process.count} times "
                f"that networks of {process} know. Export it as safetensors."
            )
    level = process.level(np.clip(times, 0.0, 1.0))
    if np.abs(level.alpha**2 + level.sigma**2 - 1).max() > 1e-9:
        raise WeightsError(f"DDIMScheduler has alpha² + sigma² = 1, which the levels of {process} are not.")
    return level.alpha**2


def _betas(model: Model, alpha2: np.ndarray) -> dict[str, Any]:
    """The rule of the betas if it gives this table of alpha², else the betas."""
    betas, process = 1 - alpha2 / np.append(1.0, alpha2[:-1]), model.process
    ends = getattr(process, "beta_start", 1e-4), getattr(process, "beta_end", 0.02)
    zero_snr = isinstance(process, DiscreteBetas) and process.zero_snr
    for name in RULES:
        rule = BETAS[SCHEDULES[name]](len(betas), *ends)
        if np.allclose(without_last_signal(rule) if zero_snr else rule, betas, rtol=1e-6, atol=0):
            named = {"beta_schedule": name, "beta_start": ends[0], "beta_end": ends[1]}
            return {**named, "rescale_betas_zero_snr": True} if zero_snr else named
    return {"trained_betas": betas.tolist()}


def _check_grid(alpha2: np.ndarray, grid: Level) -> None:
    """Refuses a student whose levels are not those of the scheduler's grid of as many steps."""
    count, steps = len(alpha2), len(grid.sigma) - 1
    here = alpha2[np.arange(count, 0, -count / steps).round().astype(int)[:steps] - 1]
    if count % steps or np.abs(np.asarray(grid.alpha[:-1]) ** 2 - here).max() > CLOSE:
        raise WeightsError(
            f"The student was made for {steps} levels that are not among the {count} of DDIMScheduler with the spacing "
            "'trailing': every (N/steps)-th time from the noisy end. Export it as safetensors."
        )
