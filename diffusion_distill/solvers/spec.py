"""How a model is sampled, as one value: solver, grid, and what is done to the model's estimates.

    dd.sample(model, 16, spec=dd.SamplerSpec("deis order=2", steps=8, guidance={"scale": 2.0}))
    dd.sample(model, 16, solver="deis order=2", steps=8, guidance={"scale": 2.0})                   the same

Configs, results, fitted solvers and Python share it. What is left out is decided by whoever samples: `complete`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_distill.base.errors import choose, near_matches, positive_int
from diffusion_distill.base.registry import from_mapping
from diffusion_distill.solvers.registry import DEFAULT_SOLVER, spelled

#: The keys of guidance, with an example of each.
GUIDANCE = {"scale": 2.0, "null": 10, "classifier": None}


@dataclass(frozen=True)
class SamplerSpec:
    """How a model is sampled.

    Attributes:
      solver: a name of `SOLVERS`, perhaps with options: 'deis order=2'; empty for `DEFAULT_SOLVER`, or the fitted one.
      steps: of the grid; 0 for the student's own number, or `api.TEACHER_STEPS` for a teacher.
      spacing: the rule of the grid; empty for the model's own.
      end: the process's time at which the grid ends; 0 for exactly zero noise.
      fitted: a D-ODE solver or its file, in place of solver, steps, spacing and end; others beside it are refused.
      clip: x_hat and the result to the range of the data; data without bounds are never clipped.
      threshold: the quantile of dynamic thresholding, see `Thresholded`; 0 for none.
      guidance: {"scale": s} of classifier-free guidance, perhaps with "null", the condition that stands for none (by
        default the model's); with "classifier", a `LogProb`, guidance by its gradient. None for no guidance.

    Raises:
      ValueError: a number of steps below 0, a negative end, a quantile outside [0, 1], guidance without a scale or with
        an unknown key, an unknown solver.
      TypeError: guidance that is no mapping, a scale that is no number, or an option the solver does not have.
    """

    solver: str = ""
    steps: int = 0
    spacing: str = ""
    end: float = 0.0
    fitted: Any = ""
    clip: bool = True
    threshold: float = 0.0
    guidance: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps != 0:
            positive_int("steps", self.steps)
        if self.solver:
            spelled(self.solver)
        if not self.end >= 0:
            raise ValueError(f"The end of a grid is a time of at least 0, got {self.end!r}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a quantile in [0, 1] (0 for none), got {self.threshold!r}.")
        object.__setattr__(self, "guidance", checked_guidance(self.guidance))

    @classmethod
    def of(cls, spec: SamplerSpec | None = None, /, **fields: Any) -> SamplerSpec:
        """A spec, or the default one, with other values of some fields; None leaves a field as it is.

        Raises:
          TypeError: there is no such field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                raise TypeError(
                    f"Sampling has no setting {name!r}.{near_matches(name, names)} Known: {', '.join(names)}."
                )
        given = {name: value for name, value in fields.items() if value is not None}
        return dataclasses.replace(spec or cls(), **given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplerSpec:
        """Reads what `to_dict` wrote. Raises ValueError or TypeError for unknown fields and wrong values."""
        return from_mapping(cls, "sampling", values)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready; a fitted solver and a classifier are named only."""
        import jax

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fitted, guidance = self.fitted, dict(self.guidance or {})
        if "classifier" in guidance:
            guidance["classifier"] = type(guidance["classifier"]).__name__
        guidance = jax.tree.map(lambda a: np.asarray(a).tolist() if hasattr(a, "dtype") else a, guidance)
        return values | {"fitted": getattr(fitted, "solver", None) or str(fitted), "guidance": guidance or None}

    def complete(self, steps: int) -> SamplerSpec:
        """With a solver, and a number of steps if there is none."""
        return dataclasses.replace(self, solver=self.solver or DEFAULT_SOLVER, steps=self.steps or steps)


def checked_guidance(guidance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Guidance as `SamplerSpec` takes it; None for none."""
    if guidance is None:
        return None
    if not isinstance(guidance, Mapping):
        raise TypeError(f'guidance must be a mapping like {{"scale": 2.0, "null": 10}}, got {guidance!r}.')
    for key in guidance:
        choose("key of guidance", key, GUIDANCE)
    if guidance and "scale" not in guidance:
        raise ValueError(f"guidance needs a scale, got {dict(guidance)}.")
    scale = guidance.get("scale", 1.0)
    if isinstance(scale, bool) or np.ndim(scale) or not np.issubdtype(np.asarray(scale).dtype, np.number):
        raise TypeError(f"The scale of guidance must be a number, got {scale!r}.")
    return dict(guidance) or None
