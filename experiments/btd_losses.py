"""BTD's ablation of teachers (Salimans & Ho, Table 1): what the network predicts, and how its error is weighted.

The loss is that of x_hat in all cells, so that "predicts eps" with weighting SNR is the usual loss of eps. Teachers are
trained as the scale's own, and sampled with DDIM.
"""

from dataclasses import replace
from itertools import product

from experiments.common.cells import Cell, Trained
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

PREDICTIONS = {"x": "x", "eps": "eps", "v": "v", "both": "x and eps"}
WEIGHTINGS = {"snr": "SNR", "snr_trunc": "truncated SNR", "snr_plus_one": "SNR + 1"}


def cells(scale: Scale) -> list[Cell]:
    """Four predictions, three weightings; trained on as many images as a distillation with 96M."""
    teacher, found = scale.teachers["vp"], []
    assert teacher.method is not None
    for (prediction, row), (weighting, column) in product(PREDICTIONS.items(), WEIGHTINGS.items()):
        channels = teacher.described.shape[-1] * (2 if prediction == "both" else 1)
        network = teacher.described.network.clone(out_ch=channels)
        model = replace(teacher.described, network=network, prediction=prediction)
        method = replace(teacher.method, length=scale.length("96M"), weighting=weighting)
        found.append(Trained(row, column, model, method))
    return found


EXPERIMENT = Experiment(
    name="btd_losses",
    title="BTD (arXiv:2202.00512), Table 1: what is predicted and how it is weighted",
    says="Several are stable; eps is so with the SNR weighting only in its usual form, and v or x and eps do as well.",
    cells=cells,
    column="weighting",
    scales=("gpu", "cpu"),
)

if __name__ == "__main__":
    EXPERIMENT.main()
