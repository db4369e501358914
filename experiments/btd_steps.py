"""BTD, Figure 4: distance by number of steps, of the teacher with DDIM and with a stochastic sampler, and of students.

The stochastic sampler is the ancestral one, whose variance lies between two bounds (`gamma`: 0 the lower, 1 the upper);
as in the paper, the best of several is taken for each number of steps, which favours it a little.
"""

from experiments.common.cells import Cell, Distilled, Sampled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
GAMMAS = (0.0, 0.1, 0.3, 1.0)
EVEN = {"spacing": "time"}


def cells(scale: Scale) -> list[Cell]:
    """The teacher with both samplers, and one run of BTD."""
    vp = [name for name in scale.teachers if name.startswith("vp")]
    found: list[Cell] = []
    for teacher in vp:
        kind = "" if teacher == "vp" else f", {teacher.removeprefix('vp_')}"
        solvers = {f"DDIM{kind}": "ddim"} | {f"ancestral γ={g:g}{kind}": f"ancestral gamma={g:g}" for g in GAMMAS}
        found.append(Sampled(f"teacher{kind}", solvers, STEPS, teacher=teacher))
        ends = tuple(steps for steps in STEPS[::-1] if steps < scale.teachers[teacher].steps)
        method = scale.btd(teacher, scale.teachers[teacher].steps, "480M")
        found.append(Distilled(f"BTD{kind}", method, ends, teacher=teacher))
    return found


EXPERIMENT = Experiment(
    name="btd_steps",
    title="BTD (arXiv:2202.00512), Figure 4: distance by number of steps",
    says="Students keep the teacher's quality down to 4 or 8 steps, where DDIM and stochastic samplers have lost it.",
    cells=cells,
    paper={("BTD", 1): 9.12, ("BTD", 2): 4.51, ("BTD", 4): 3.0, ("BTD", 8): 2.57},
)

if __name__ == "__main__":
    EXPERIMENT.main()
