"""Training, distilling, sampling and evaluating as plain functions: what the command line and notebooks call.

source = data.digits()
teacher = train(model, source, Denoising(length="200K"))
students = distill(teacher, source, Tract((1024, 32, 1), length="200K"))
images = sample(students[1], 16)
images = sample(teacher, 16, fitted=fit_solver(teacher, "ddim", 10))
"""

from diffusion_distill.runs.comparison import Comparison, Setting, compare_solvers
from diffusion_distill.runs.evaluation import evaluate
from diffusion_distill.runs.exchange import export_weights, import_inception, import_weights, is_inception
from diffusion_distill.runs.fitting import FitSettings, fit_solver
from diffusion_distill.runs.sampling import TEACHER_STEPS, denoiser_of, grid_for, labels_for, sample, table_for
from diffusion_distill.runs.settings import Settings
from diffusion_distill.runs.training import distill, train

__all__ = [
    "TEACHER_STEPS",
    "Comparison",
    "FitSettings",
    "Setting",
    "Settings",
    "compare_solvers",
    "denoiser_of",
    "distill",
    "evaluate",
    "export_weights",
    "fit_solver",
    "grid_for",
    "import_inception",
    "import_weights",
    "is_inception",
    "labels_for",
    "sample",
    "table_for",
    "train",
]
