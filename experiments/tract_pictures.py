"""TRACT, Figures 2 to 4: samples of students of 1, 2, 4 and 8 steps beside their teacher's, from the same noise.

The students are those of experiments/tract_methods.py, which are trained first where they are not there.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import diffusion_distill as dd
from experiments.common.cells import NOISE_SEED, Cell, Distilled, Pictured, Place
from experiments.common.runner import Experiment
from experiments.common.scales import Scale
from experiments.tract_methods import EXPERIMENT as METHODS
from experiments.tract_methods import teachers

SHOWN = 16


def samples(place: Place, seed: int, folder: Path, *, teacher: str) -> Mapping[str, str]:
    """One line for the teacher and for each student."""
    described, there = place.scale.teachers[teacher], replace(place, experiment=METHODS.name)

    def draw(artefact: dd.Artefact, steps: int | None = None, solver: str = "ddim") -> np.ndarray:
        return dd.sample(artefact, SHOWN, steps, solver=solver, seed=NOISE_SEED, batch_size=SHOWN)

    steps = min(64, described.steps)
    rows = {f"teacher, {steps} steps": draw(place.teacher(teacher), steps, described.solver)}
    for cell in METHODS.cells(place.scale):
        if isinstance(cell, Distilled) and cell.teacher == teacher:
            students = cell.students(there, seed)
            rows |= {f"{cell.row}: {end}": draw(students[end]) for end in cell.ends}
    dd.report.image_grid(rows, folder / "samples.png", columns=SHOWN)
    return {"samples.png": "Students of 1 to 8 steps and their teacher from the same noise."}


def cells(scale: Scale) -> list[Cell]:
    """One for each teacher."""
    return [Pictured(f"samples of {name}", partial(samples, teacher=name), name) for name in teachers(scale)]


EXPERIMENT = Experiment(
    name="tract_pictures",
    title="TRACT (arXiv:2303.04248), Figures 2 to 4: samples",
    says="Samples of one step are close to the teacher's.",
    cells=cells,
)

if __name__ == "__main__":
    EXPERIMENT.main()
