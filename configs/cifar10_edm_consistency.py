"""Consistency distillation of an EDM teacher of CIFAR-10 32x32 as one case of TRACT: arXiv:2303.01469, section 4.

TRACT with a single group that ends at zero noise has consistency distillation's target: the teacher makes one step, and
the student's own average answers from there (arXiv:2303.04248, section 3). D-ODE compares with it.

    paper      one step: FID 3.55, two steps: 2.93, with the LPIPS metric; with squared errors, as here, more (Figure 3)
    teacher    NCSN++, unconditional: edm-cifar10-32x32-uncond-ve, of which a Heun step is taken on 18 levels of EDM
    training   batch 512, 800,000 updates, learning rate 4e-4, constant weighting; the target's average has momentum 0,
               that is the student's last parameters; the average that is sampled from has 0.9999 (appendix C)
    differs    the paper has RAdam and keeps x_hat = z at the last level by its parameterisation; here it is Adam, and
               the student predicts as its teacher, whose x_hat there is z to 0.002
    cost       800,000 updates on 8 GPUs; hours unknown. Not run here

    python -m diffusion_distill.main --mode=import --model=edm-cifar10-32x32-uncond-ve --workdir=runs/edm_cifar10
    python -m diffusion_distill.main --mode=distill --config=configs/cifar10_edm_consistency.py \
        --workdir=runs/cifar10_edm_consistency --config.teacher=runs/edm_cifar10

Data: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_edm_consistency.py:cifar10.zip
"""

from diffusion_distill import OptimizerSettings, Settings, Tract
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Tract.edm(
            (18, 1),
            length=800_000 * 512,
            self_momentum=0.0,
            residual=0.0,
            momentum=0.9999,
            weighting="constant",
            learning_rate=4e-4,
        ),
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
