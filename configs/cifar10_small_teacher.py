"""A CIFAR-10 32x32 teacher for one GPU: BTD's network at half its width, class-conditional, in bfloat16.

No paper has this row. 15.1M parameters; meant for a few hours on one data-centre GPU, never run at this length by us.

    python -m diffusion_distill.main --mode=train --config=configs/cifar10_small_teacher.py --workdir=runs/cifar10_small

Data: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_small_teacher.py:cifar10.zip
"""

from diffusion_distill import Denoising, Settings
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.weights import PUBLISHED


def get_config(path: str = ""):
    """The config; `path` is a folder or zip with train/CLASS/IMAGE in place of TFDS."""
    network = {"ch": 128, "emb_ch": 512, "dropout": 0.1, "num_classes": 10, "dtype": "bfloat16"}
    return config_of(
        model=PUBLISHED["cifar_original"].model.with_network(**network),
        method=Denoising(length="20M", learning_rate=4e-4, warmup=1000, anneal=True, residual=1e-3),
        settings=Settings(batch_size=256, flip=True, checkpoint_every=2000, evaluate_every="500K"),
        data=images("cifar10", path),
        reference=images("cifar10", path),
        steps=64,
        count=10_000,
    )
