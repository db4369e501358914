"""D-ODE, Figures 3, 4, 9 and 10: solvers with and without fitted lambdas, by number of network calls.

Models that predict noise with DDIM, iPNDM, DPM-Solver-3, DPM-Solver++ and DEIS-3; EDM's with DDIM and Heun's method.
C = 10, B = 100, uniform times (EDM's grid for EDM), nothing clipped, a teacher of at most 1000 steps: DDIM, or for
iPNDM and DEIS the solver itself. Seeds are those of the fits.
"""

from typing import Any

import diffusion_distill as dd
from experiments.common.cells import Cell, Sampled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

#: 'deis order=4' combines four outputs, which is the paper's DEIS-3.
NOISE = {
    "DDIM": "ddim",
    "iPNDM": "ipndm",
    "DPM-Solver-3": "dpm_solver order=3 method=singlestep",
    "DPM-Solver++": "dpm_solver++ order=2",
    "DEIS-3": "deis order=4",
}
DATA = {"DDIM, EDM": "ddim", "Heun, EDM": "heun"}
NFE = {"paper": (2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 50), "gpu": (3, 5, 10, 15, 25, 50), "cpu": (3, 5, 10, 15, 25)}
#: The paper's FIDs on CIFAR-10 by network calls.
DDIM, D_DDIM = {10: 18.85, 25: 9.79, 50: 7.17}, {10: 8.67, 25: 8.18, 50: 6.55}
AS_THEY_ARE: dict[str, Any] = {"clip": False}


def cells(scale: Scale) -> list[Cell]:
    """One cell for each kind of model."""
    return [
        Sampled("noise", NOISE, NFE[scale.name], dd.FitSettings(), "eps", options=AS_THEY_ARE),
        Sampled("EDM", DATA, NFE[scale.name], dd.FitSettings(), "edm", truth=("heun", 100), options=AS_THEY_ARE),
    ]


EXPERIMENT = Experiment(
    name="dode_solvers",
    title="D-ODE (arXiv:2309.16421), Figures 3, 4, 9 and 10: solvers, base and fitted",
    says="A fitted solver is better than its base from some 3 to 25 calls; D-DDIM with 2 calls may be worse.",
    cells=cells,
    paper={("DDIM", nfe): value for nfe, value in DDIM.items()}
    | {("D-DDIM", nfe): value for nfe, value in D_DDIM.items()},
    column="network calls",
)

if __name__ == "__main__":
    EXPERIMENT.main()
