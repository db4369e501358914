"""BTD on LSUN bedroom and church 128x128, 1024→512→...→1: arXiv:2202.00512, released configurations.

    paper      FID at any number of steps: unknown here
    training   per halving 50,000 updates of 2048 images, the last two (to 2 and to 1 steps) twice as many in the paper;
               Adam 1e-4 falling to 0 in each halving, gradients clipped to 1 per device, no average
    cost       10 halvings, 12 x 102.4M images; hours unknown

    python -m diffusion_distill.main --mode=import --model=church_original --workdir=runs/church_original
    python -m diffusion_distill.main --mode=distill --config=configs/lsun128_btd.py:church --workdir=runs/church_btd \
        --config.teacher=runs/church_original

Data: TFDS 'lsun/bedroom' or 'lsun/church_outdoor', or a folder or zip with train/IMAGE after a comma:
--config=configs/lsun128_btd.py:church,church.zip
"""

from diffusion_distill import OptimizerSettings, Progressive, Settings
from diffusion_distill.base.errors import choose
from diffusion_distill.cli.build import config_of, images

#: The sets' names in TensorFlow Datasets.
DATASETS = {"bedroom": "lsun/bedroom", "church": "lsun/church_outdoor"}


def get_config(run: str = "bedroom"):
    """The config of 'bedroom' or 'church', with a folder or zip with train/IMAGE after a comma."""
    subset, _, path = run.partition(",")
    data = images(choose("LSUN set", subset, DATASETS), path, size=128, resample="bilinear")
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
        data=data,
        reference=data,
        count=50_000,
    )
