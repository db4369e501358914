"""Descriptions of models as earlier versions of this library exported them, in today's words.

earlier                          today
schedule                         process
image_shape                      shape
prediction 'score'               'scaled_score' ('score' is the gradient of log p(z) itself)
schedule 'edm' of n steps        process 've' with the same range; a student of it gets its levels
schedule 've'                    process 've' with the usual range; its time was sigma
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_distill.process import grids
from diffusion_distill.process.ve import VE

FIELDS = {"schedule": "process", "image_shape": "shape"}
PREDICTIONS = {"score": "scaled_score"}


def translated(about: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an export; one in today's words, or one that cannot be read, stays as it is."""
    model = about.get("model")
    if not isinstance(model, Mapping) or "schedule" not in model:
        return dict(about)
    model = {FIELDS.get(name, name): value for name, value in model.items()}
    prediction = model.get("prediction")
    if isinstance(prediction, str):
        model["prediction"] = PREDICTIONS.get(prediction, prediction)
    found, process = {**about, "model": model}, model["process"]
    if isinstance(process, Mapping) and process.get("name") == "edm":
        model["process"] = {"name": "ve", **{k: process[k] for k in ("sigma_min", "sigma_max") if k in process}}
        found["grid"] = _grid_of(process, about.get("steps"))
    return found


def _grid_of(process: Mapping[str, Any], steps: Any) -> dict[str, Any] | None:
    """The levels of a student of EDM's grid: every k-th of its first teacher's."""
    teacher_steps = process.get("steps", 18)
    if not steps or teacher_steps % steps:
        return None
    ends = {name: process[name] for name in ("sigma_min", "sigma_max") if name in process}
    grid = grids.karras(VE(**ends), teacher_steps, rho=process.get("rho", 7.0))
    return grids.to_numbers(grid.at(slice(None, None, teacher_steps // steps)))
