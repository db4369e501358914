"""D-ODE, Tables 2, 4 and 8: other ways to put lambdas into DDIM.

Sep and All multiply other differences, D-DDIM-2 adds a second one; Fixed and LA search one lambda for all steps by the
Fréchet distance. The candidates are ours.
"""

import diffusion_distill as dd
from experiments.common.cells import Cell, Sampled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale
from experiments.dode_solvers import AS_THEY_ARE
from experiments.dode_solvers import EXPERIMENT as SOLVERS

VARIANTS = {"DDIM": "ddim", "DDIM-Sep": "ddim-sep", "DDIM-All": "ddim-all", "DDIM-2": "ddim-2"}
SEARCHED = {"Fixed-D-DDIM": "ddim", "LA-DDIM": "ddim-la"}
CANDIDATES = (-0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
NFE = (5, 10, 25, 50)


def cells(scale: Scale) -> list[Cell]:
    """The variants that are fitted, and one cell for each that is searched."""
    searched = dd.FitSettings(candidates=CANDIDATES)
    return [
        Sampled("fitted", VARIANTS, NFE, dd.FitSettings(), "eps", options=AS_THEY_ARE),
        *(
            Sampled(title, {title: name}, NFE, searched, "eps", options=AS_THEY_ARE, base=False, prefix="")
            for title, name in SEARCHED.items()
        ),
    ]


EXPERIMENT = Experiment(
    name="dode_variants",
    title="D-ODE (arXiv:2309.16421), Tables 2, 4 and 8: variants of D-DDIM",
    says=(
        "Sep and All are much worse than DDIM itself and D-DDIM-2 no better; D-DDIM is best at 10 calls, and one "
        "searched lambda is as good or better from 25 calls on."
    ),
    cells=cells,
    paper={
        **SOLVERS.paper,
        ("D-DDIM-Sep", 10): 79.21,
        ("D-DDIM-Sep", 25): 26.40,
        ("D-DDIM-Sep", 50): 11.50,
        ("D-DDIM-All", 10): 179.67,
        ("D-DDIM-All", 25): 36.65,
        ("D-DDIM-All", 50): 18.48,
        ("D-DDIM-2", 10): 18.75,
        ("D-DDIM-2", 25): 9.83,
        ("D-DDIM-2", 50): 7.21,
        ("Fixed-D-DDIM", 10): 11.45,
        ("Fixed-D-DDIM", 25): 7.00,
        ("Fixed-D-DDIM", 50): 5.27,
        ("LA-DDIM", 10): 15.24,
        ("LA-DDIM", 25): 8.57,
        ("LA-DDIM", 50): 6.29,
    },
    column="network calls",
)

if __name__ == "__main__":
    EXPERIMENT.main()
