"""Training, distilling, sampling and evaluating as plain functions: what the command line and notebooks call.

source = data.digits()
teacher = train(model, source, Denoising(length="200K"))
students = distill(teacher, source, Tract((1024, 32, 1), length="200K"))
images = sample(students[1], 16)
images = sample(teacher, 16, fitted=fit_solver(teacher, "ddim", 10))
"""

from diffusion_distill.api.evaluation import evaluate
from diffusion_distill.api.exchange import (
    EXPORTS,
    export_weights,
    exported,
    import_inception,
    import_weights,
    is_inception,
    read_noisy_classifier,
)
from diffusion_distill.api.fitting import FitSettings, fit_solver
from diffusion_distill.api.sampling import TEACHER_STEPS, denoiser_of, grid_for, sample, table_for
from diffusion_distill.api.training import distill, train
from diffusion_distill.solvers.spec import SamplerSpec
from diffusion_distill.training.settings import Settings

__all__ = [
    "EXPORTS",
    "TEACHER_STEPS",
    "FitSettings",
    "SamplerSpec",
    "Settings",
    "denoiser_of",
    "distill",
    "evaluate",
    "export_weights",
    "exported",
    "fit_solver",
    "grid_for",
    "import_inception",
    "import_weights",
    "is_inception",
    "read_noisy_classifier",
    "sample",
    "table_for",
    "train",
]
