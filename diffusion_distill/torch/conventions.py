"""What the config of a scheduler of diffusers says of its model, in our terms.

    family    process                      prediction (prediction_type)                 the model is told
    betas     N discrete betas             eps, x or v (epsilon, sample, v_prediction)  the index i of time (i + 1)/N
    edm       VE                           EDM's F (epsilon; v_prediction is -F)        log(sigma) / 4, scaled inputs
    flow      rectified flow with a shift  velocity (flow_prediction), eps, x, v        N·sigma

A solver may ask the network between the whole indices of a model of betas, as midpoints and singlestep methods do. It
is told the fraction, which the embeddings of diffusers' networks take, though it was not trained on it; never below 0.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import PREDICTED
from diffusion_distill.process.processes import VE, DiscreteBetas, Process, RectifiedFlow
from diffusion_distill.process.time_input import EDMInput, FlowInput, TimeInput, TimeOfProcess
from diffusion_distill.process.vp_discrete import SCHEDULES

#: What a config may ask for that is not computed here.
REFUSED = ("trained_betas", "thresholding", "invert_sigmas", "shift_terminal", "use_flow_sigmas", "snr_shift_scale")
#: What to do about some of them.
REFUSED_BUT = {
    "use_flow_sigmas": "give the config of FlowMatchEulerDiscreteScheduler(shift=...) with its flow_shift",
}
#: Options about the spacing of sigmas that are not read, and their values that would move levels.
NOT_READ = {
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), True),
    "sigma_schedule": "exponential",
    "final_sigmas_type": "sigma_min",
    "interpolation_type": "log_linear",
}


@dataclass(frozen=True)
class IndexInput(TimeOfProcess):
    """`TimeOfProcess` of a model of N betas: the index i of the time (i + 1)/N, at least 0."""

    offset: float = -1.0

    def time(self, level: Level, process: Process) -> Array:
        """factor·t - 1, at least 0."""
        return np.maximum(super().time(level, process), 0.0)


class Convention(NamedTuple):
    """How a model is called and what it returns.

    Attributes:
      process: the levels of its times.
      prediction: what its output stands for, a name of `PREDICTIONS`.
      inputs: how it is told a level.
      sigma_data: standard deviation of the data, of EDM's models.
      sign: of its output: -1 for EDM's v_prediction.
    """

    process: Process
    prediction: str
    inputs: TimeInput
    sigma_data: float = 0.5
    sign: float = 1.0

    def told(self, level: Level) -> np.ndarray:
        """The numbers that the model is told for levels."""
        return np.asarray(self.inputs.time(level, self.process), np.float64)

    def levels_told(self, told: Array) -> Level:
        """The levels [n] of numbers that the model is told, the inverse of `told`.

        Raises:
          ValueError: a model of N betas has no such index.
        """
        told = np.asarray(told, np.float64)
        if isinstance(self.inputs, IndexInput):
            last = self.inputs.factor - 1
            if told.size and not (told.min() >= 0 and told.max() <= last):
                raise ValueError(f"This model's timesteps lie in 0 to {last:g}, got {told.min():g} to {told.max():g}.")
            return self.process.level((told + 1) / self.inputs.factor)
        if isinstance(self.inputs, FlowInput):
            sigma = told / self.inputs.factor
            return Level(1 - sigma, sigma)
        return Level(np.ones_like(told), np.exp(4 * told))

    def levels_of(self, sigmas: Array) -> Level:
        """The levels [n] of sigmas as diffusers and ComfyUI write them: sigma of a flow, sigma/alpha of all others."""
        sigmas = np.asarray(sigmas, np.float64)
        if isinstance(self.process, RectifiedFlow):
            return Level(1 - sigmas, sigmas)
        if isinstance(self.process, VE):
            return Level(np.ones_like(sigmas), sigmas)
        alpha = 1 / np.hypot(1.0, sigmas)
        return Level(alpha, alpha * sigmas)

    def owns(self, grid: Level) -> bool:
        """Whether levels are of the model's kind: alpha² + sigma², alpha, or of a flow alpha + sigma, is 1."""
        alpha, sigma = (np.asarray(part, np.float64) for part in grid)
        of_kind = {RectifiedFlow: alpha + sigma, VE: alpha}.get(type(self.process), np.hypot(alpha, sigma))
        return bool(np.allclose(of_kind, 1.0, rtol=0, atol=1e-4))

    def sigmas(self, level: Level) -> np.ndarray:
        """The inverse of `levels_of`."""
        return np.asarray(level.sigma if isinstance(self.process, RectifiedFlow) else level.sigma / level.alpha)


def family_of(settings: Mapping[str, Any]) -> str:
    """The family of a config of a scheduler of diffusers.

    Raises:
      ValueError: its entries are those of no family.
    """
    if "beta_schedule" in settings:
        return "betas"
    if "shift" in settings:
        return "flow"
    if "sigma_data" in settings and "prediction_type" in settings and not _of_cosine(settings):
        return "edm"
    raise ValueError("The config does not say what its model takes and returns: give family='betas', 'edm' or 'flow'.")


def _of_cosine(settings: Mapping[str, Any]) -> bool:
    """Whether a config is that of CosineDPMSolverMultistepScheduler, whose models are told atan(sigma)·2/pi."""
    return "solver_order" in settings and "algorithm_type" not in settings


def check(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a config of a scheduler of diffusers asks for something that is not computed here."""
    for name in REFUSED:
        if settings.get(name) is not None and settings[name] is not False:
            found = reprlib.repr(settings[name])
            advice = REFUSED_BUT.get(name, "keep diffusers' own")
            raise ValueError(f"A scheduler with {name}={found} is not computed here: {advice}.")
    if settings.get("timestep_type") == "continuous":
        raise ValueError(
            "A model of betas told log(sigma)/4 (timestep_type='continuous') is not computed here: keep diffusers' own "
            "scheduler."
        )


def warn_of_spacing(settings: Mapping[str, Any]) -> None:
    """Warns of options in a config of any scheduler of diffusers that would move levels and are not read here."""
    found = [f"{name}={settings[name]!r}" for name, value in NOT_READ.items() if settings.get(name) == value]
    if found:
        warnings.warn(
            f"{', '.join(found)} of the config is not read: levels follow its timestep_spacing, EDM's rule or the "
            "flow's shift. Give spacing='karras' or another rule, or grid=, to choose them.",
            stacklevel=4,
        )


def read(settings: Mapping[str, Any]) -> Convention:
    """The convention of a config of `DistilledODEScheduler`.

    Raises:
      ValueError: an unknown family, prediction or rule of betas, or eps predicted where there is no signal.
    """
    return choose("family of a scheduler", settings["family"], FAMILIES)(settings)


def _betas(settings: Mapping[str, Any]) -> Convention:
    count = settings["num_train_timesteps"]
    kind = choose("rule of betas", settings["beta_schedule"], SCHEDULES)
    prediction = choose("prediction_type", settings["prediction_type"], PREDICTED)
    ends = settings["beta_start"], settings["beta_end"]
    process = DiscreteBetas(kind, count, *ends, zero_snr=bool(settings["rescale_betas_zero_snr"]))
    process.check_prediction(prediction)
    return Convention(process, prediction, IndexInput(float(count)))


def _edm(settings: Mapping[str, Any]) -> Convention:
    sign = choose("prediction_type", settings["prediction_type"], {"epsilon": 1.0, "v_prediction": -1.0})
    process, sigma_data = VE(settings["sigma_max"], settings["sigma_min"]), settings["sigma_data"]
    return Convention(process, "edm", EDMInput(sigma_data), sigma_data, sign)


def _flow(settings: Mapping[str, Any]) -> Convention:
    names = {"flow_prediction": "velocity", **PREDICTED}
    prediction = choose("prediction_type", settings["prediction_type"], names)
    return Convention(RectifiedFlow(settings["shift"]), prediction, FlowInput(float(settings["num_train_timesteps"])))


FAMILIES = {"betas": _betas, "edm": _edm, "flow": _flow}
