"""A classifier of MNIST 28x28, whose features stand in for pixels: minutes on two CPU cores.

No paper has this row, and we have not run it on the whole set.

    python -m diffusion_distill.main --mode=classifier --config=configs/mnist_classifier.py \
        --workdir=runs/mnist_classifier

Data: TFDS 'mnist', its test split held out (`reference`); or a folder or zip with the sub-folders train and test; or
two .npz with images and labels, the second held out: --config=configs/mnist_classifier.py:train.npz,test.npz
"""

from diffusion_distill.api.classifier import ClassifierSettings
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; `path` is a folder, a zip or two .npz in place of TFDS."""
    train, _, heldout = path.partition(",")
    if train.endswith(".npz") and not heldout:
        raise ValueError(f"One .npz leaves nothing to measure on. Give two: --config=FILE:{train},HELDOUT.npz")
    return config_of(
        model=None,
        method=None,
        settings=None,
        data=images("mnist", train),
        reference=images("mnist", heldout or train, split="test"),
        classifier=ClassifierSettings(length="200K", batch_size=128, shift=2),
    )
