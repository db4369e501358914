"""TRACT, Table 3: the momentum of the self-teacher, 1024→32→1.

The momenta are ours, since the paper's are not all known here; the average that is evaluated has momentum 0.99995, or
what keeps as much of the parameters at the start of a phase at another length.
"""

from experiments.common.cells import Cell, Distilled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

MOMENTA = (0.0, 0.01, 0.5, 0.9, 0.99, 0.999)
LENGTH, PHASE = "96M", "48M"


def cells(scale: Scale) -> list[Cell]:
    """One for each momentum."""
    schedule, kept = (scale.teachers["vp"].steps, 32, 1), scale.momentum(0.99995, PHASE)
    return [
        Distilled(
            "TRACT, one step",
            scale.tract("vp", schedule, LENGTH, self_momentum=momentum, momentum=kept),
            column=momentum,
        )
        for momentum in MOMENTA
    ]


EXPERIMENT = Experiment(
    name="tract_self_teacher",
    title="TRACT (arXiv:2303.04248), Table 3: momentum of the self-teacher",
    says="The distance is flat over a wide range, grows above it, and is large and varies at momenta up to 0.01.",
    cells=cells,
    column="momentum of the self-teacher",
)

if __name__ == "__main__":
    EXPERIMENT.main()
