"""D-ODE, Table 3: the teacher's steps per call of the student, C, and the images of a fit, B. Seeds are of the fits."""

import diffusion_distill as dd
from experiments.common.cells import Cell, Sampled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale
from experiments.dode_solvers import AS_THEY_ARE, D_DDIM

SCALES = (5, 10, 20, 30)
BATCHES = (5, 10, 50, 100)
NFE = (5, 10, 25, 50)


def cells(scale: Scale) -> list[Cell]:
    """D-DDIM with each C at B = 100, and with each B at C = 10."""
    settings = {f"C = {c}, B = 100": dd.FitSettings(scale=c) for c in SCALES}
    settings |= {f"C = 10, B = {b}": dd.FitSettings(batch_size=b) for b in BATCHES[:-1]}
    return [
        Sampled(title, {title: "ddim"}, NFE, fit, "eps", options=AS_THEY_ARE, base=False, prefix="")
        for title, fit in settings.items()
    ]


EXPERIMENT = Experiment(
    name="dode_settings",
    title="D-ODE (arXiv:2309.16421), Table 3: C and B of D-DDIM",
    says="Larger C and larger B help; C = 20 and 30 are the same at 50 calls, where the teacher has its 1000 steps.",
    cells=cells,
    paper={("C = 10, B = 100", nfe): value for nfe, value in D_DDIM.items()},
    column="network calls",
)

if __name__ == "__main__":
    EXPERIMENT.main()
