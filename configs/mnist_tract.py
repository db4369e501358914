"""TRACT 1024→32→1 of the MNIST teacher (configs/mnist_teacher.py).

No paper has this row, and we have not run it at this length.

    python -m diffusion_distill.main --mode=distill --config=configs/mnist_tract.py --workdir=runs/mnist_tract \
        --config.teacher=runs/mnist_teacher/teacher

Data: TFDS 'mnist', or an .npz with images and labels: --config=configs/mnist_tract.py:mnist.npz
"""

from diffusion_distill import Settings, Tract
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Tract((1024, 32, 1), length="2M", weighting="snr_plus_one", learning_rate=1e-3, anneal=True),
        settings=Settings(batch_size=128, evaluate_every="200K"),
        data=images("mnist", path),
        reference=images("mnist", path),
        count=2000,
    )
