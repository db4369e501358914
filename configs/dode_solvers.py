"""D-ODE solvers on the teachers of arXiv:2309.16421, by data set: --config=configs/dode_solvers.py:SET or :SET,PATH

    set          teacher, by its name for --mode=import                paper's FID at 10, 25 and 50 evaluations
    cifar10      ddpm-cifar10, predicts noise, linear betas            DDIM 18.85, 9.79, 7.17; D-DDIM 8.67, 8.18, 6.55;
                                                                       Fixed-D-DDIM 11.45, 7.00, 5.27; LA-DDIM 15.24,
                                                                       8.57, 6.29; D-DDIM-2 18.75, 9.83, 7.21;
                                                                       D-DDIM-Sep 79.21, 26.40, 11.50; D-DDIM-All
                                                                       179.67, 36.65, 18.48 (Tables 2 and 4)
    celeba64     none published by name: a file of DDPM's family       not in the sources at hand (figures)
    imagenet64   iddpm-imagenet64, 4000 cosine betas, no classes       not in the sources at hand (figures)
    imagenet128  adm-imagenet128; the paper guides it by a classifier  not in the sources at hand (figures)
    bedroom256   adm-lsun-bedroom                                      not in the sources at hand (figures)
    ffhq64       edm-ffhq-64x64-uncond-vp, predicts x (EDM)            not in the sources at hand (figures)

    paper      scale C = 10, batch B = 100 (25 for bedroom), uniform times (rho = 7 for EDM), nothing clipped, a teacher
               of at most 1000 steps; FID of 50,000 samples, 3 seeds, 2 to 50 evaluations
    here       the paper's ImageNet 128 adds a classifier's gradient of scale 1.25, which is not in the config: with
               --config.sample.classifier=128x128_classifier.pt --config.sample.guidance=1.25
    cost       a fit of 10 evaluations is 110 evaluations of 100 images: seconds to minutes on one GPU

    python -m diffusion_distill.main --mode=import --model=ddpm-cifar10 --workdir=runs/ddpm_cifar10
    python -m diffusion_distill.main --mode=fit --config=configs/dode_solvers.py:cifar10 --workdir=runs/cifar10_d_ddim \
        --config.artefact=runs/ddpm_cifar10 --config.sample.solver=ddim --config.sample.steps=10
    python -m diffusion_distill.main --mode=sample --config=configs/dode_solvers.py:cifar10 \
        --workdir=runs/cifar10_d_ddim --config.artefact=runs/ddpm_cifar10 \
        --config.sample.fitted=runs/cifar10_d_ddim/solver.json
    python -m diffusion_distill.main --mode=solvers --config=configs/dode_solvers.py:cifar10 \
        --workdir=runs/cifar10_solvers --config.artefact=runs/ddpm_cifar10 --config.solvers.features=runs/inception

The last command measures FID on imported Inception weights (--mode=import --model=inception-pytorch-fid
--workdir=runs/inception). As the published programs fit: --config.fit.pairing=published

Reference images: of TFDS, or those at PATH, a folder or zip. CelebA and FFHQ need one, with images cut as the teacher's
were: there is no such set in TFDS.
"""

from typing import NamedTuple

from diffusion_distill.base.errors import choose
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.studies.comparison import Comparison

#: Of models that predict noise: D-DDIM, D-iPNDM, D-DPM-Solver-3, D-DPM-Solver++, D-DEIS-3 (four outputs).
NOISE = ("ddim", "ipndm", "dpm_solver order=3 method=singlestep", "dpm_solver++ order=2", "deis order=4")
EDM = ("ddim", "heun")


class Row(NamedTuple):
    """One of the paper's data sets."""

    teacher: str  # of `PUBLISHED`; empty if it has none
    dataset: str  # in TensorFlow Datasets
    size: int
    batch: int = 100  # of a fit, B
    solvers: tuple[str, ...] = NOISE
    needs_path: bool = False  # TensorFlow Datasets has no such set


ROWS = {
    "cifar10": Row("ddpm-cifar10", "cifar10", 32),
    "celeba64": Row("", "celeba64", 64, needs_path=True),
    "imagenet64": Row("iddpm-imagenet64", "imagenet2012", 64),
    "imagenet128": Row("adm-imagenet128", "imagenet2012", 128),
    "bedroom256": Row("adm-lsun-bedroom", "lsun/bedroom", 256, batch=25),
    "ffhq64": Row("edm-ffhq-64x64-uncond-vp", "ffhq64", 64, solvers=EDM, needs_path=True),
}


def get_config(run: str = "cifar10"):
    """The config of a data set, with a folder or zip of its images after a comma; the model is the teacher's."""
    name, _, path = run.partition(",")
    row = choose("data set of D-ODE", name, ROWS)
    if row.needs_path and not path:
        raise ValueError(f"{name} needs a folder or zip of its images: --config=configs/dode_solvers.py:{name},PATH")
    data = images(row.dataset, path, size=row.size)
    config = config_of(
        model=None,
        method=None,
        settings=None,
        data=data,
        reference=data,
        count=50_000,
        clip=False,
        steps=10,
        comparison=Comparison(row.solvers, nfe=(5, 10, 15, 20, 25, 50), repetitions=3),
    )
    config.update_from_flattened_dict({"fit.batch_size": row.batch})
    return config
