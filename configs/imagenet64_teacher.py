"""BTD's teacher of ImageNet 64x64, class-conditional: arXiv:2202.00512, released configuration 'imagenet64'.

    paper      FID of this teacher sampled with many steps: unknown here
    training   batch 2048, Adam 3e-4 after 1000 updates of warm-up, average 0.9999, dropout 0.1, predicts x and eps
    length     unknown (the configuration does not say); 1G images (524 thousand updates) is our choice
    cost       unknown; 295.9M parameters
    weights    published: --mode=import --model=imagenet_original --workdir=runs/imagenet_original spares this run

    python -m diffusion_distill.main --mode=train --config=configs/imagenet64_teacher.py --workdir=runs/imagenet64

Data: TFDS 'imagenet2012', cropped and reduced by area to 64x64, or a folder or zip: --config=...teacher.py:FOLDER
"""

from diffusion_distill import Denoising, OptimizerSettings, Settings
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.weights import PUBLISHED


def get_config(path: str = ""):
    """The config; `path` is a folder or zip with train/CLASS/IMAGE in place of TFDS."""
    return config_of(
        model=PUBLISHED["imagenet_original"].model.with_network(dropout=0.1),
        method=Denoising(length="1G", learning_rate=3e-4, warmup=1000, momentum=0.9999, averaging="plain"),
        settings=Settings(
            batch_size=2048,
            flip=True,
            checkpoint_every=2000,
            evaluate_every="20M",
            optimizer=OptimizerSettings(grad_clip=1.0, clip_scope="shard"),
        ),
        data=images("imagenet2012", path, size=64),
        reference=images("imagenet2012", path, size=64),
        steps=1024,
        count=50_000,
    )
