"""TRACT from NVIDIA's EDM teacher of CIFAR-10 32x32, 40→1 in one phase: arXiv:2303.04248, Tables 1 and 2 and A.4.

    paper      one step: FID 3.8 (best TRACT-EDM); two steps: 3.32 as quoted by later papers (inferred to be this one)
    teacher    NCSN++, unconditional, 56.4M parameters (A.4): edm-cifar10-32x32-uncond-ve, sampled by 40 steps of Heun's
               method (79 NFE)
    training   batch 512, Adam, no gradient clipping, self-teacher 0.5, eval average with residual 1e-3; 96M (256M) =
               96·2^20 images
    rate       constant, one for students of one step and another one for students of several steps (A.4); neither
               number is in the sources at hand. Here it is 1e-3 for both, the published program's default: give the
               multi-step rate as --config.method.learning_rate=RATE
    cost       196,608 updates on 8 GPUs for 96M; hours unknown

    python -m diffusion_distill.main --mode=import --model=edm-cifar10-32x32-uncond-ve --workdir=runs/edm_cifar10
    python -m diffusion_distill.main --mode=distill --config=configs/cifar10_edm_tract.py \
        --workdir=runs/cifar10_edm_tract --config.teacher=runs/edm_cifar10

Other ends: --config.method.schedule='(40,2)'. Data: TFDS 'cifar10', or a folder or zip:
--config=configs/cifar10_edm_tract.py:cifar10.zip
"""

from diffusion_distill import OptimizerSettings, Settings, Tract
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Tract.edm((40, 1), length="96M"),
        settings=Settings(
            batch_size=512,
            flip=True,
            checkpoint_every=5000,
            evaluate_every="1M",
            optimizer=OptimizerSettings(grad_clip=0.0),
        ),
        data=images("cifar10", path),
        reference=images("cifar10", path),
        count=50_000,
    )
