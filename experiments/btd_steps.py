"""BTD, Figure 4: distance by number of steps, of the teacher with DDIM and with a stochastic sampler, and of students.

The stochastic sampler is the ancestral one, whose variance lies between two bounds (`gamma`: 0 the lower, 1 the upper);
as in the paper, the best of several is taken for each number of steps, which favours it a little.

The paper's four data sets are CIFAR-10, ImageNet 64, and LSUN bedroom and church 128. At the scale cpu there are digits
of 8x8 pixels and MNIST at 14x14, which `--data mnist=train.npz,test.npz` reads from files with images and labels.
"""

from experiments.common.cells import Cell, Distilled, Sampled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
GAMMAS = (0.0, 0.1, 0.3, 1.0)
#: Training images where they are not 480M; 1200M is published, and MNIST is shorter, as its images are larger.
LENGTHS = {"vp_imagenet64": "1200M", "vp_bedroom": "1200M", "vp_church": "1200M", "vp_mnist": "120M"}


def cells(scale: Scale) -> list[Cell]:
    """Of each data set the teacher with both samplers, and one run of BTD."""
    found: list[Cell] = []
    for teacher in scale.teachers:
        if not teacher.startswith("vp"):
            continue
        kind = "" if teacher == "vp" else f", {teacher.removeprefix('vp_')}"
        solvers = {f"DDIM{kind}": "ddim"} | {f"ancestral γ={g:g}{kind}": f"ancestral gamma={g:g}" for g in GAMMAS}
        steps = STEPS[:6] if teacher == "vp_mnist" else STEPS
        found.append(Sampled(f"teacher{kind}", solvers, steps, teacher=teacher))
        method = scale.btd(teacher, scale.teachers[teacher].steps, LENGTHS.get(teacher, "480M"))
        found.append(Distilled(f"BTD{kind}", method, steps[::-1], teacher=teacher))
    return found


EXPERIMENT = Experiment(
    name="btd_steps",
    title="BTD (arXiv:2202.00512), Figure 4: distance by number of steps",
    says="Students keep the teacher's quality down to 4 or 8 steps, where DDIM and stochastic samplers have lost it.",
    cells=cells,
    apart=True,
    paper={("BTD", 1): 9.12, ("BTD", 2): 4.51, ("BTD", 4): 3.0, ("BTD", 8): 2.57},
)

if __name__ == "__main__":
    EXPERIMENT.main()
