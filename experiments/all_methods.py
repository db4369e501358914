"""All methods from one teacher: quality, network calls, training cost and time, in one table.

BTD, TRACT, consistency distillation (TRACT with one group that ends at zero noise), D-ODE fits, and plain solvers, all
from the VP teacher. No paper has this table. Every distillation has as many training images.
"""

import diffusion_distill as dd
from experiments.common.cells import Cell, Distilled, Sampled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

STEPS = (1, 2, 4, 8)
LENGTH = "96M"
PLAIN = {"DDIM": "ddim", "DPM-Solver++": "dpm_solver++ order=2", "UniPC": "unipc"}


def solvers() -> Sampled:
    """The teacher with plain and with fitted solvers."""
    return Sampled("solvers", PLAIN, (*STEPS, 16, 32), dd.FitSettings(), options={"clip": False})


def students(scale: Scale, length: str = LENGTH, said: str = "") -> list[Distilled]:
    """The distillations to one step and more.

    Args:
      length: of each, as published.
      said: behind the names of the rows.
    """
    start = scale.teachers["vp"].steps
    return [
        Distilled(f"BTD{said}", scale.btd("vp", start, length), STEPS[::-1]),
        Distilled(f"consistency distillation{said}", scale.tract("vp", (start, 1), length)),
        *(Distilled(f"TRACT{said}", scale.tract("vp", (start, 32, steps), length), (steps,)) for steps in STEPS),
    ]


def cells(scale: Scale) -> list[Cell]:
    """The solvers, and the distillations."""
    return [solvers(), *students(scale)]


EXPERIMENT = Experiment(
    name="all_methods",
    title="All methods from one teacher",
    says="nothing of all together; in D-ODE's Table 1 a fit of minutes stands beside students trained for days.",
    cells=cells,
    column="network calls",
)

if __name__ == "__main__":
    EXPERIMENT.main()
