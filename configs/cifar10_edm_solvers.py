"""D-ODE solvers on NVIDIA's EDM teacher of CIFAR-10 32x32: arXiv:2309.16421, its EDM columns (D-DDIM and D-EDM).

    paper      scale C = 10, batch B = 100, rho = 7, sigma 0.002 to 80, no churn; FID of 50,000 samples, 3 seeds. Its
               FIDs of EDM teachers are not in the sources at hand. With a VP teacher of CIFAR-10 that predicts eps, at
               10, 25 and 50 NFE, DDIM has 18.85, 9.79 and 7.17, D-DDIM 8.67, 8.18 and 6.55 (Tables 2 and 4)
    cost       a fit of D-EDM at 9 evaluations is 99 evaluations of 100 images: seconds on one GPU

    python -m diffusion_distill.main --mode=import --model=edm-cifar10-32x32-uncond-vp --workdir=runs/edm_cifar10
    python -m diffusion_distill.main --mode=fit --config=configs/cifar10_edm_solvers.py --workdir=runs/cifar10_dode \
        --config.artefact=runs/edm_cifar10 --config.sample.solver=heun --config.sample.steps=5
    python -m diffusion_distill.main --mode=import --model=inception-pytorch-fid --workdir=runs/inception
    python -m diffusion_distill.main --mode=solvers --config=configs/cifar10_edm_solvers.py \
        --workdir=runs/cifar10_edm_solvers --config.artefact=runs/edm_cifar10 \
        --config.solvers.features=runs/inception:tensorflow --config.evaluation.statistics=cifar10-32x32.npz

The last command measures the FID of three times 50,000 samples of every solver against EDM's published statistics;
without `statistics`, against the reference images, which are read batch by batch.

As the published program fits: --config.sample.solver='heun keep_slope=true' --config.fit.pairing=published
Reference images: TFDS 'cifar10', or a folder or zip: --config=configs/cifar10_edm_solvers.py:cifar10.zip
"""

from diffusion_distill.cli.build import config_of, images
from diffusion_distill.studies.comparison import Comparison


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
        comparison=Comparison(("ddim", "heun", "ipndm", "deis", "dpm_solver++", "unipc"), repetitions=3),
    )
