"""TRACT on CIFAR-10 32x32, 1024→32→1: arXiv:2303.04248, Tables 1 and 2 and appendix A.3, VP teacher.

    paper      one step: FID 5.02 with 96M training images, 4.45 with 256M; two steps: unknown here. On BTD's ten
               phases, 48M images each, TRACT has 6.8 and BTD 5.95
    training   batch 256, Adam (2e-4 in the published code), gradients clipped to 1, self-teacher 0.5, eval average
               with residual 1e-3; 96M = 96·2^20 images over both phases
    phases     the best runs gave the last phase a larger share of the images (footnote of section 4.3). The share is
               unknown here, so the phases are equal; --config.method.shares='(1,3)' makes the last three times as long
    cost       393,216 updates on 8 GPUs for 96M; hours unknown

    python -m diffusion_distill.main --mode=import --model=cifar_original --workdir=runs/cifar_original
    python -m diffusion_distill.main --mode=distill --config=configs/cifar10_tract.py --workdir=runs/cifar10_tract \
        --config.teacher=runs/cifar_original --config.method.length=96M

The published code lets the student go on between phases where the paper restarts it from the teacher:
--config.method.phase_start=continue.

Data: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_tract.py:cifar10.zip
"""

from diffusion_distill import OptimizerSettings, Settings, Tract
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; the model is the teacher's."""
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
        data=images("cifar10", path),
        reference=images("cifar10", path),
        count=50_000,
    )
