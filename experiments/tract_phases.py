"""TRACT, Tables 5 and 6: one to five phases, with equal images in all and with equal images in each; and ten phases.

The schedules in between are ours: reductions as equal as powers of two allow. Ten phases are BTD's.
"""

from experiments.common.cells import Cell, Distilled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

SCHEDULES = {
    1: (1024, 1),
    2: (1024, 32, 1),
    3: (1024, 128, 8, 1),
    4: (1024, 256, 32, 8, 1),
    5: (1024, 256, 64, 16, 4, 1),
}
TEN = tuple(2**k for k in range(10, -1, -1))


def cells(scale: Scale) -> list[Cell]:
    """Table 5, Table 6 (one and two phases are in Table 5 at that length), and ten phases of TRACT and BTD."""
    found: list[Cell] = [
        Distilled("TRACT, 96M in all", scale.tract("vp", schedule, "96M"), column=phases)
        for phases, schedule in SCHEDULES.items()
    ]
    found += [
        Distilled("TRACT, 48M each", scale.tract("vp", SCHEDULES[phases], f"{48 * phases}M"), column=phases)
        for phases in (3, 4, 5)
    ]
    found.append(Distilled("TRACT, 48M each", scale.tract("vp", TEN, "480M"), column=10))
    found.append(Distilled("BTD, 48M each", scale.btd("vp", 1024, "480M", last_two_longer=1.0), column=10))
    return found


EXPERIMENT = Experiment(
    name="tract_phases",
    title="TRACT (arXiv:2303.04248), Tables 5 and 6: number of phases",
    says=(
        "Two phases are best and one is worst; from three on quality falls, also with 48M images for each phase. On "
        "BTD's ten phases BTD is better than TRACT."
    ),
    cells=cells,
    paper={("TRACT, 96M in all", 2): 5.02, ("TRACT, 48M each", 10): 6.8, ("BTD, 48M each", 10): 5.95},
    column="phases",
)

if __name__ == "__main__":
    EXPERIMENT.main()
