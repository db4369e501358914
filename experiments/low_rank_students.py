"""Students as low-rank adapters of their teacher (arXiv:2106.09685), against students that are trained whole.

TRACT in two phases to one step, with the same length and learning rate for every rank. The memory of each is in the
table of docs/runs.md, the speed of its updates comes from benchmarks/low_rank.py.
"""

from experiments.common.cells import Cell, Distilled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

#: A rank above the shorter side of a kernel, seen as a matrix, is that side.
RANKS = (0, 4, 16, 64)
TEACHERS = ("vp", "vp_mnist")


def cells(scale: Scale) -> list[Cell]:
    """The whole student and one of each rank, of every data set that the scale has."""
    return [
        Distilled(
            f"one step, {scale.teachers[name].data}",
            scale.tract(name, (scale.teachers[name].steps, 32, 1), "96M"),
            column=rank or "whole",
            teacher=name,
            running={"low_rank": rank},
        )
        for name in TEACHERS
        if name in scale.teachers
        for rank in RANKS
    ]


EXPERIMENT = Experiment(
    name="low_rank_students",
    title="Students as low-rank adapters (after arXiv:2106.09685)",
    says="adapters of a low rank do as well as training all parameters, for language models that are fine-tuned.",
    cells=cells,
    column="rank of the adapters, or whole",
)

if __name__ == "__main__":
    EXPERIMENT.main()
