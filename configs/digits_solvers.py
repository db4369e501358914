"""D-ODE solvers on the digits teachers: fit one, or compare all of them, base and D-, at 2 to 25 evaluations.

    paper      arXiv:2309.16421 in small: scale C = 10, batch B = 100, uniform time. Its teacher is of CIFAR-10: FID of
               DDIM at 10, 25 and 50 evaluations 18.85, 9.79 and 7.17, of D-DDIM 8.67, 8.18 and 6.55 (Tables 2 and 4)
    cost       a fit of 10 evaluations is 110 evaluations of 100 images: seconds; the comparison is minutes on two cores

    python -m diffusion_distill.main --mode=fit --config=configs/digits_solvers.py --workdir=runs/digits_dode \
        --config.artefact=runs/digits/teacher/teacher --config.sample.solver=ddim --config.sample.steps=10
    python -m diffusion_distill.main --mode=sample --config=configs/digits_solvers.py --workdir=runs/digits_dode \
        --config.artefact=runs/digits/teacher/teacher --config.sample.fitted=runs/digits_dode/solver.json
    python -m diffusion_distill.main --mode=solvers --config=configs/digits_solvers.py --workdir=runs/digits_solvers \
        --config.artefact=runs/digits/teacher/teacher

For the EDM teacher: --config=configs/digits_solvers.py:edm. A distilled student is fitted to the model it comes from:
--config.artefact=runs/digits/tract_4/student_4 --config.teacher=runs/digits/teacher/teacher
"""

from diffusion_distill.cli.build import config_of
from diffusion_distill.studies.comparison import Comparison

#: The published solvers of each kind of model; NFE that a solver cannot make are left out.
SOLVERS = {
    "vp": ("ddim", "ipndm", "deis", "dpm_solver", "dpm_solver++", "dpm_solver++ method=singlestep", "unipc"),
    "edm": ("ddim", "heun", "ipndm", "deis", "dpm_solver++", "unipc"),
}


def get_config(kind: str = "vp"):
    """The config; `kind` of the teacher is 'vp' or 'edm'."""
    return config_of(
        model=None,
        method=None,
        settings=None,
        data={"name": "digits", "split": "train"},
        reference={"name": "digits", "split": "train"},
        count=900,
        batch_size=300,
        steps=10,
        comparison=Comparison(SOLVERS[kind]),
    )
