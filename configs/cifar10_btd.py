"""BTD on CIFAR-10 32x32, 8192→4096→...→1: arXiv:2202.00512, released configuration 'cifar'.

    paper      FID 2.57 at 8 steps, 3.0 at 4, 4.51 at 2 and 9.12 at one; arXiv:2303.04248 reports 5.95 at one step for
               a run of its own with ten phases of 48M images each
    training   per halving 50,000 updates of 128 images, the last two (to 2 and to 1 steps) twice as many in the paper;
               Adam 5e-5 falling to 0 in each halving, gradients clipped to 1 per device, no average
    cost       13 halvings, 15 x 6.4M images; hours unknown

    python -m diffusion_distill.main --mode=import --model=cifar_original --workdir=runs/cifar_original
    python -m diffusion_distill.main --mode=distill --config=configs/cifar10_btd.py --workdir=runs/cifar10_btd \
        --config.teacher=runs/cifar_original

Data: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_btd.py:cifar10.zip
"""

from diffusion_distill import OptimizerSettings, Progressive, Settings
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Progressive(8192, 1, phase_length=50_000 * 128, last_two_longer=2.0, learning_rate=5e-5),
        settings=Settings(
            batch_size=128,
            flip=True,
            checkpoint_every=5000,
            evaluate_every="1M",
            optimizer=OptimizerSettings(grad_clip=1.0, clip_scope="shard"),
        ),
        data=images("cifar10", path),
        reference=images("cifar10", path),
        count=50_000,
    )
