"""Students with enough capacity reach their teacher's map, on data whose flow is known.

On Gaussian data the optimal denoiser is affine in z at every level; on a mixture it is one curve for every pixel.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
import toys

from diffusion_distill import api
from diffusion_distill.methods import DISTILLERS, Progressive, Tract
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Cosine, RectifiedFlow
from diffusion_distill.solvers import engine, tabulate
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import OptimizerSettings

STEPS = 16
LEARNED: dict[str, Any] = {
    "btd": Progressive(STEPS, 1, 64 * 300, 1.0, learning_rate=0.03, weighting="snr_plus_one"),
    "tract": Tract((STEPS, 4, 1), 64 * 2400, learning_rate=0.03, anneal=True, clip="none", weighting="snr_plus_one",
                   residual=1e-6),
}  # fmt: skip
SETTINGS = api.Settings(batch_size=64, log_every=300, optimizer=OptimizerSettings(grad_clip=0.0, eps=1e-12))
PROCESSES = {"cosine": Cosine(), "rectified flow": RectifiedFlow(), "shifted": RectifiedFlow(3.0)}


def result(artefact: Artefact, grid: Level, start: Any) -> np.ndarray:
    """Where DDIM's steps on a grid lead."""
    return np.asarray(engine.integrate(artefact.denoiser(clip=False), tabulate("ddim", grid).plain(), start))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", LEARNED)
def test_a_student_reaches_the_teachers_map(
    name: str, process: Any, gaussian: toys.Gaussian, toy_networks: None, one_device: None
) -> None:
    """Few DDIM steps of the student lead where the teacher's many steps lead."""
    assert set(LEARNED) == set(DISTILLERS) - {"knowledge", "guided"}, "which keep the steps"
    data = dataclasses.replace(gaussian, process=process)
    students = api.distill(toys.exact_teacher(data, STEPS), toys.GaussianSource(data), LEARNED[name], SETTINGS)
    teacher, start = toys.exact_teacher(data, STEPS), jax.random.normal(jax.random.key(0), (256, 2, 2, 1))

    def led(artefact: Artefact, grid: Level) -> np.ndarray:
        return result(artefact, grids.clean_end(grid) if name == "btd" else grid, start)

    truth = led(teacher, grids.make_grid(process, STEPS))
    assert set(students) == {steps for _, steps in pairwise((16, 8, 4, 2, 1) if name == "btd" else (16, 4, 1))}
    for steps, student in students.items():
        assert student.grid is not None
        np.testing.assert_array_equal(np.stack(student.grid), np.stack(grids.make_grid(process, steps)))
        before, after = (np.abs(led(model, student.grid) - truth).max() for model in (teacher, student))
        assert after < 2e-3, (steps, after)
        assert after < 0.05 * before, "the teacher alone must be far from it, else nothing was learned"


@pytest.mark.parametrize("name", LEARNED)
def test_students_of_a_rectified_flow_reach_the_map_of_a_mixture(
    name: str, toy_networks: None, one_device: None
) -> None:
    """From pure noise to data in one step, along the flow that keeps every pixel's quantile."""
    data, process = toys.Mixture(), RectifiedFlow()
    teacher, source = toys.mixture_teacher(data, process, 32), toys.PixelSource(data.draw(4 * 4096, seed=7))
    method = {
        "btd": Progressive(32, 1, 64 * 200, 2.0, learning_rate=0.02, weighting="velocity"),
        "tract": Tract((32, 4, 1), 64 * 2000, learning_rate=0.02, anneal=True, clip="none", weighting="velocity",
                       residual=1e-4),
    }[name]  # fmt: skip
    students = api.distill(teacher, source, method, SETTINGS)
    start = np.asarray(jax.random.normal(jax.random.key(0), (512, 2, 2, 1)), np.float64)
    flow = data.flow(start, process.level(np.float64(1)), process.level(np.float64(0)))

    def error(artefact: Artefact, steps: int) -> float:
        found = result(artefact, grids.make_grid(process, steps), start.astype(np.float32))
        return float(np.sqrt(np.mean((found - flow) ** 2)))

    many, one, student = error(teacher, 32), error(teacher, 1), error(students[1], 1)
    assert many < 0.05 < 0.4 < one, "the teacher's many steps are near the flow, one is not"
    assert student < 1.5 * many, (student, many)
