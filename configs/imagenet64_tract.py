"""TRACT on ImageNet 64x64, class-conditional, two phases: arXiv:2303.04248, Tables 1, 2 and A.3, VP teacher.

    paper      one step: FID 7.43 with 96M training images; two steps: unknown here
    training   batch 256, Adam (2e-4 in the published code), gradients clipped to 1, self-teacher 0.5, eval average with
               residual 1e-3, predicts x and eps; the step count between the two phases is not in the sources at hand:
               32 as for CIFAR-10
    cost       393,216 updates on 8 GPUs for 96M; hours unknown

    python -m diffusion_distill.main --mode=import --model=imagenet_original --workdir=runs/imagenet_original
    python -m diffusion_distill.main --mode=distill --config=configs/imagenet64_tract.py \
        --workdir=runs/imagenet64_tract --config.teacher=runs/imagenet_original
"""

from diffusion_distill import OptimizerSettings, Settings, Tract
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; `path` is a folder or zip with train/CLASS/IMAGE in place of TFDS."""
    return config_of(
        model=None,
        method=Tract((1024, 32, 1), length="96M", learning_rate=2e-4),
        settings=Settings(
            batch_size=256,
            flip=True,
            checkpoint_every=5000,
            evaluate_every="1M",
            optimizer=OptimizerSettings(grad_clip=1.0, clip_eps=1e-6),
        ),
        data=images("imagenet2012", path, size=64),
        reference=images("imagenet2012", path, size=64),
        count=50_000,
    )
