"""TRACT from NVIDIA's EDM teacher of ImageNet 64x64 (ADM), 128→1 in one phase: arXiv:2303.04248, A.4.

    paper      FID unknown here at one step; at two steps 4.97 as quoted by later papers
    training   batch 512, Adam (1e-3 in the published code) rising over 4M images, no gradient clipping, Heun teacher of
               128 steps (255 NFE), self-teacher 0.5, eval average with residual 1e-3; length not stated: 96M
    cost       8 A100; hours unknown

    python -m diffusion_distill.main --mode=import --model=edm-imagenet-64x64-cond-adm --workdir=runs/edm_imagenet
    python -m diffusion_distill.main --mode=distill --config=configs/imagenet64_edm_tract.py \
        --workdir=runs/imagenet64_edm_tract --config.teacher=runs/edm_imagenet
"""

from diffusion_distill import OptimizerSettings, Settings, Tract
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Tract.edm((128, 1), length="96M", warmup=2**22 // 512),
        settings=Settings(
            batch_size=512,
            flip=True,
            checkpoint_every=5000,
            evaluate_every="1M",
            optimizer=OptimizerSettings(grad_clip=0.0),
        ),
        data=images("imagenet2012", path, size=64),
        reference=images("imagenet2012", path, size=64),
        count=50_000,
    )
