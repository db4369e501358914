"""Knowledge distillation to a network of a third of the size on CIFAR-10: arXiv:2303.04248, A.9 and its Table 9.

    paper      TRACT 1024→32→1 with this phase, 96M images, 19.4M of 60.0M parameters: FID 6.47 (5.02 without)
    training   as configs/cifar10_tract.py; the place of the phase (at 32 steps or at 1) and its share of the 96M
               images are not in the sources at hand: here at 32 steps, with 32M images
    cost       unknown

    ... first 1024→32: configs/cifar10_tract.py with --config.method.schedule='(1024,32)' --workdir=runs/cifar10_tract
    python -m diffusion_distill.main --mode=distill --config=configs/cifar10_knowledge.py --workdir=runs/cifar10_small \
        --config.teacher=runs/cifar10_tract/student_32
    ... then 32→1: configs/cifar10_tract.py with --config.method.schedule='(32,1)' \
        --config.teacher=runs/cifar10_small/student_32
"""

from diffusion_distill import Knowledge, OptimizerSettings, Settings
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.weights import PUBLISHED


def get_config(path: str = ""):
    """The config; `path` is a folder or zip with train/CLASS/IMAGE in place of TFDS."""
    return config_of(
        model=None,
        student=PUBLISHED["cifar_original"].model.with_network(ch=128),
        method=Knowledge(32, length="32M", learning_rate=2e-4),
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
