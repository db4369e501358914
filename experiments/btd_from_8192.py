"""BTD from 8192 steps in place of 1024 (Salimans & Ho): a discretely sampled teacher of more steps changes little."""

from experiments.common.cells import Cell, Distilled
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

STARTS = (1024, 8192)
ENDS = (8, 4, 2, 1)
PHASE = 48  # million images of a halving


def cells(scale: Scale) -> list[Cell]:
    """Equal images for each halving."""
    return [
        Distilled(f"from {start}", scale.btd("vp", start, f"{PHASE * (start.bit_length() + 1)}M"), ENDS)
        for start in STARTS
    ]


EXPERIMENT = Experiment(
    name="btd_from_8192",
    title="BTD (arXiv:2202.00512): from 8192 steps",
    says="Starting from 8192 steps gives nearly the same students as from 1024.",
    cells=cells,
)

if __name__ == "__main__":
    EXPERIMENT.main()
