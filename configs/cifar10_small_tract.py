"""TRACT 1024→32→1 of the small CIFAR-10 teacher (configs/cifar10_small_teacher.py), for one GPU.

No paper has this row, and we have not run it at this length.

    python -m diffusion_distill.main --mode=distill --config=configs/cifar10_small_tract.py \
        --workdir=runs/cifar10_small_tract --config.teacher=runs/cifar10_small/teacher

Data: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_small_tract.py:cifar10.zip
"""

from diffusion_distill import Settings, Tract
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Tract((1024, 32, 1), length="20M", learning_rate=2e-4),
        settings=Settings(batch_size=256, flip=True, checkpoint_every=2000, evaluate_every="500K"),
        data=images("cifar10", path),
        reference=images("cifar10", path),
        count=10_000,
    )
