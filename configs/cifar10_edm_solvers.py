"""D-ODE solvers on NVIDIA's EDM teacher of CIFAR-10 32x32: arXiv:2309.16421, its EDM columns (D-DDIM and D-EDM).

    paper      scale C = 10, batch B = 100, rho = 7, sigma 0.002 to 80, no churn; FID of 50,000 samples, 3 seeds
    cost       a fit of D-EDM at 9 evaluations is 99 evaluations of 100 images: seconds on one GPU

    python -m diffusion_distill.main --mode=import --model=edm-cifar10-32x32-uncond-vp --workdir=runs/edm_cifar10
    python -m diffusion_distill.main --mode=fit --config=configs/cifar10_edm_solvers.py --workdir=runs/cifar10_dode \
        --config.artefact=runs/edm_cifar10 --config.sample.solver=heun --config.sample.steps=5
    python -m diffusion_distill.main --mode=solvers --config=configs/cifar10_edm_solvers.py \
        --workdir=runs/cifar10_edm_solvers --config.artefact=runs/edm_cifar10

As the published program fits: --config.sample.solver='heun keep_slope=true' --config.fit.pairing=published
Reference images: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_edm_solvers.py:cifar10.zip
"""

from diffusion_distill.build import config_of, images
from diffusion_distill.runs import Comparison


def get_config(path: str = ""):
    """The config; the model is the imported teacher's."""
    return config_of(
        model=None,
        method=None,
        settings=None,
        data=images("cifar10", path),
        reference=images("cifar10", path),
        count=50_000,
        clip=False,
        steps=5,
        comparison=Comparison(("ddim", "heun", "ipndm", "deis", "dpm_solver++", "unipc")),
    )
