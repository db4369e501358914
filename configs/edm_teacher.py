"""EDM's teachers of CIFAR-10 32x32, FFHQ and AFHQv2 64x64 and ImageNet 64x64: arXiv:2206.00364 and its code.

    paper      CIFAR-10 conditional FID 1.79, ImageNet 64 FID 1.36; the others unknown here
    training   the table below: options published with the code; Adam, learning rate rising over 10M images from 0,
               average with a half-life that is at most a twentieth of the past, losses summed over pixels
    not here   the authors' non-leaking augmentation (probability 0.12 to 0.15, none for ImageNet) and half precision
    cost       CIFAR-10 2 days, FFHQ and AFHQv2 4 days on 8 V100; ImageNet 13 days on 32 A100
    weights    published: --mode=import --model=edm-cifar10-32x32-cond-vp --workdir=runs/edm_cifar10 spares this run

    python -m diffusion_distill.main --mode=train --config=configs/edm_teacher.py:cifar10 --workdir=runs/edm_cifar10

Data: TFDS for cifar10 and imagenet64, else a folder or zip after a comma: --config=configs/edm_teacher.py:ffhq,ffhq.zip
"""

from diffusion_distill import Denoising, OptimizerSettings, Settings
from diffusion_distill.base.errors import choose
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.weights import PUBLISHED

#: published model, TFDS name, size, dropout, batch, learning rate, images, half-life of the average in images
RUNS = {
    "cifar10": ("edm-cifar10-32x32-cond-vp", "cifar10", None, 0.13, 512, 1e-3, 200e6, 0.5e6),
    "ffhq": ("edm-ffhq-64x64-uncond-vp", "ffhq", 64, 0.05, 256, 2e-4, 200e6, 0.5e6),
    "afhqv2": ("edm-afhqv2-64x64-uncond-vp", "afhqv2", 64, 0.25, 256, 2e-4, 200e6, 0.5e6),
    "imagenet64": ("edm-imagenet-64x64-cond-adm", "imagenet2012", 64, 0.10, 4096, 1e-4, 2500e6, 50e6),
}


def get_config(run: str = "cifar10"):
    """The config of one of `RUNS`, with a folder or zip of images after a comma."""
    name, _, path = run.partition(",")
    published, dataset, size, dropout, batch_size, learning_rate, length, half_life = choose("run", name, RUNS)
    data = images(dataset, path, **({"size": size} if size else {}))
    return config_of(
        model=PUBLISHED[published].model.with_network(dropout=dropout),
        method=Denoising(
            length=int(length),
            noise="lognormal",
            weighting="edm",
            reduction="sum",
            learning_rate=learning_rate,
            warmup=round(10e6 / batch_size),
            cold_start=True,
            momentum=0.5 ** (batch_size / half_life),
            averaging="ramped",
        ),
        settings=Settings(
            batch_size=batch_size,
            checkpoint_every=2000,
            evaluate_every="2M",
            optimizer=OptimizerSettings(grad_clip=0.0),
        ),
        data=data,
        reference=data,
        solver="heun",
        steps=18,
        count=50_000,
    )
