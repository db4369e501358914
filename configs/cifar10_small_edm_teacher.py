"""A class-conditional EDM teacher of CIFAR-10 32x32 for one GPU: DDPM++ at half its width, in bfloat16.

No paper has this row, and we have not run it at this length.

    python -m diffusion_distill.main --mode=train --config=configs/cifar10_small_edm_teacher.py:cifar10.zip \
        --workdir=runs/cifar10_small_edm
    python -m diffusion_distill.main --mode=distill --config=configs/cifar10_edm_tract.py:cifar10.zip \
        --workdir=runs/cifar10_small_edm_tract --config.teacher=runs/cifar10_small_edm/teacher \
        --config.method.length=20M --config.run.batch_size=256
"""

from diffusion_distill import Denoising, Settings
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.weights import PUBLISHED


def get_config(path: str = ""):
    """The config; `path` is a folder or zip with train/CLASS/IMAGE in place of TFDS."""
    return config_of(
        model=PUBLISHED["edm-cifar10-32x32-cond-vp"].model.with_network(
            ch=64, emb_ch=256, augment_dim=0, dropout=0.1, dtype="bfloat16"
        ),
        method=Denoising(
            length="20M",
            noise="lognormal",
            weighting="edm",
            learning_rate=1e-3,
            warmup=1000,
            anneal=True,
            residual=1e-3,
        ),
        settings=Settings(batch_size=256, flip=True, checkpoint_every=2000, evaluate_every="500K"),
        data=images("cifar10", path),
        reference=images("cifar10", path),
        solver="heun",
        steps=18,
        count=10_000,
    )
