"""BTD on ImageNet 64x64, class-conditional, 1024→512→...→1: arXiv:2202.00512, released configuration 'imagenet64'.

    paper      one step: FID 17.5 after 1.2G images (as reported in arXiv:2303.04248); other steps: unknown here
    training   per halving 50,000 updates of 2048 images, the last two (to 2 and to 1 steps) twice as many in the paper;
               Adam 1e-4 falling to 0 in each halving, gradients clipped to 1 per device, no average
    cost       10 halvings, 12 x 102.4M images; hours unknown

    python -m diffusion_distill.main --mode=import --model=imagenet_original --workdir=runs/imagenet_original
    python -m diffusion_distill.main --mode=distill --config=configs/imagenet64_btd.py --workdir=runs/imagenet64_btd \
        --config.teacher=runs/imagenet_original
"""

from diffusion_distill import OptimizerSettings, Progressive, Settings
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; `path` is a folder or zip with train/CLASS/IMAGE in place of TFDS."""
    return config_of(
        model=None,
        method=Progressive(1024, 1, phase_length=50_000 * 2048, last_two_longer=2.0, learning_rate=1e-4),
        settings=Settings(
            batch_size=2048,
            flip=True,
            checkpoint_every=2000,
            evaluate_every="20M",
            optimizer=OptimizerSettings(grad_clip=1.0, clip_scope="shard"),
        ),
        data=images("imagenet2012", path, size=64),
        reference=images("imagenet2012", path, size=64),
        count=50_000,
    )
