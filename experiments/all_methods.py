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


def cells(scale: Scale) -> list[Cell]:
    """The solvers, and the distillations to one step and more."""
    start = scale.teachers["vp"].steps
    options = {"clip": False}
    solvers = Sampled("solvers", PLAIN, (*STEPS, 16, 32), dd.FitSettings(), options=options)
    tract = [Distilled("TRACT", scale.tract("vp", (start, 32, steps), LENGTH), (steps,)) for steps in STEPS]
    consistency = Distilled("consistency distillation", scale.tract("vp", (start, 1), LENGTH))
    return [solvers, Distilled("BTD", scale.btd("vp", start, LENGTH), STEPS[::-1]), consistency, *tract]


EXPERIMENT = Experiment(
    name="all_methods",
    title="All methods from one teacher",
    says="nothing of all together; in D-ODE's Table 1 a fit of minutes stands beside students trained for days.",
    cells=cells,
    column="network calls",
)

if __name__ == "__main__":
    EXPERIMENT.main()
