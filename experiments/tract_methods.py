"""TRACT, Tables 1, 2, 7 and 8: TRACT and BTD at 1, 2, 4 and 8 steps, from VP and EDM teachers.

TRACT from a VP teacher takes two phases, 1024→32→n; from an EDM teacher one. The BTD row from an EDM teacher is not in
the paper.
"""

from experiments.common.cells import Cell, Distilled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

STEPS = (1, 2, 4, 8)
LENGTH = "96M"
TEACHERS = ("vp", "edm", "vp_imagenet64", "edm_imagenet64")


def teachers(scale: Scale) -> list[str]:
    """The teachers of a scale that the paper's tables have."""
    return [name for name in TEACHERS if name in scale.teachers]


def cells(scale: Scale) -> list[Cell]:
    """One run of BTD gives all its students; TRACT is trained for each number of steps."""
    found: list[Cell] = []
    for teacher in teachers(scale):
        start, name = scale.teachers[teacher].steps, teacher.upper().replace("_", " ")
        between = (32,) if teacher.startswith("vp") else ()
        for steps in STEPS:
            method = scale.tract(teacher, (start, *between, steps), LENGTH)
            found.append(Distilled(f"TRACT, {name}", method, (steps,), teacher=teacher))
        if start & (start - 1) == 0:  # BTD halves
            found.append(Distilled(f"BTD, {name}", scale.btd(teacher, start, LENGTH), STEPS[::-1], teacher=teacher))
    return found


EXPERIMENT = Experiment(
    name="tract_methods",
    title="TRACT (arXiv:2303.04248), Tables 1, 2, 7 and 8: methods at 1 to 8 steps",
    says="At one step TRACT is better than BTD for as many training images; at 4 and 8 steps slightly worse.",
    cells=cells,
    paper={
        ("TRACT, VP", 1): 5.02,
        ("TRACT, EDM", 1): 3.8,
        ("BTD, VP", 1): 9.12,
        ("TRACT, VP IMAGENET64", 1): 7.43,
        ("BTD, VP IMAGENET64", 1): 17.5,
    },
)

if __name__ == "__main__":
    EXPERIMENT.main()
