"""TRACT, Table 4 and Figure 5: the momentum of the average that is evaluated, for trainings of several lengths.

The paper's rule takes the momentum from the length of a phase, so that a residual of 1e-3 of the parameters at its
start is left. Fixed momenta are given for batches of 256; at another scale they become those with the same residual
after a phase of 48M.
"""

from experiments.common.cells import Cell, Distilled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

LENGTHS = ("24M", "48M", "96M")
FIXED = (0.999, 0.9999, 0.99995, 0.99999)
PHASE = "48M"


def cells(scale: Scale) -> list[Cell]:
    """The residual rule and every fixed momentum, at every length."""
    schedule, found = (scale.teachers["vp"].steps, 32, 1), []
    for length in LENGTHS:
        method = scale.tract("vp", schedule, length)
        found.append(Distilled("residual 1e-3", method, column=length))
        for momentum in FIXED:
            method = scale.tract("vp", schedule, length, momentum=scale.momentum(momentum, PHASE))
            found.append(Distilled(f"momentum {momentum}", method, column=length))
    return found


EXPERIMENT = Experiment(
    name="tract_inference_momentum",
    title="TRACT (arXiv:2303.04248), Table 4 and Figure 5: momentum of the evaluated average",
    says="The rule of the residual is at least as good as any fixed momentum at every length, and longer is better.",
    cells=cells,
    paper={("residual 1e-3", "96M"): 5.02},
    column="training images",
)

if __name__ == "__main__":
    EXPERIMENT.main()
