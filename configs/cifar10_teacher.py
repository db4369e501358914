"""BTD's teacher of CIFAR-10 32x32, unconditional: arXiv:2202.00512, released configuration 'cifar'.

    paper      FID of this teacher sampled with many steps: unknown here (not in the sources at hand)
    training   batch 128, Adam 2e-4 after 1000 updates of warm-up, weight decay 1e-3, average 0.9999, dropout 0.2
    length     unknown (the configuration does not say); 100M images (820 thousand updates) is our choice
    cost       unknown; 60.0M parameters
    weights    published: --mode=import --model=cifar_original --workdir=runs/cifar_original spares this run

    python -m diffusion_distill.main --mode=train --config=configs/cifar10_teacher.py --workdir=runs/cifar10_teacher

Data: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_teacher.py:cifar10.zip
"""

from diffusion_distill import Denoising, OptimizerSettings, Settings
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.weights import PUBLISHED


def get_config(path: str = ""):
    """The config; `path` is a folder or zip with train/CLASS/IMAGE in place of TFDS."""
    return config_of(
        model=PUBLISHED["cifar_original"].model.with_network(dropout=0.2),
        method=Denoising(length="100M", learning_rate=2e-4, warmup=1000, momentum=0.9999, averaging="plain"),
        settings=Settings(
            batch_size=128,
            flip=True,
            checkpoint_every=5000,
            evaluate_every="1M",
            optimizer=OptimizerSettings(grad_clip=1.0, clip_scope="shard", weight_decay=1e-3),
        ),
        data=images("cifar10", path),
        reference=images("cifar10", path),
        steps=1024,
        count=50_000,
    )
