"""TRACT, Table 9 and appendix A.9: to a network of a third of the parameters, in a phase of its own.

The phase stands before or after the last reduction; which of the two the paper's number is of is not known here.
"""

import diffusion_distill as dd
from experiments.common.cells import Cell, Distilled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

SMALLER = {"paper": {"ch": 128}, "gpu": {"ch": 72, "norm_groups": 8}, "cpu": {"ch": 8, "norm_groups": 8}}


def cells(scale: Scale) -> list[Cell]:
    """The full network, and the smaller one taught at 32 steps and at one; at 32 also for ten times as long."""
    teacher, small = scale.teachers["vp"], SMALLER[scale.name]
    rule = {k: v for k, v in teacher.distilling.items() if k != "clip"}

    def smaller(steps: int, after: Distilled, length: str = "32M") -> Distilled:
        method = dd.Knowledge(steps, length=scale.length(length), **rule)
        column = f"at {steps}" if length == "32M" else f"at {steps}, {length}"
        return Distilled("to the small network", method, (steps,), column, after=after, student=small)

    full = Distilled("full network", scale.tract("vp", (teacher.steps, 32, 1), "96M"), column="at 1")
    half = Distilled("full network", scale.tract("vp", (teacher.steps, 32), "48M"), (32,), "at 32")
    last = scale.tract("vp", (32, 1), "48M")
    before = [
        Distilled(f"small network before 32→1{said}", last, column="at 1", after=smaller(32, half, length))
        for length, said in {"32M": "", "320M": ", taught 320M images"}.items()
    ]
    return [full, smaller(1, full), *before]


EXPERIMENT = Experiment(
    name="tract_knowledge",
    title="TRACT (arXiv:2303.04248), Table 9: to a network of a third of the parameters",
    says="The smaller network loses little: 6.47 where the full one has 5.02.",
    cells=cells,
    paper={("full network", "at 1"): 5.02, ("small network before 32→1", "at 1"): 6.47},
    column="network taught",
)

if __name__ == "__main__":
    EXPERIMENT.main()
