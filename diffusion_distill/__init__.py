"""Distilling diffusion models in time, in JAX: BTD, TRACT, D-ODE solvers, and what they need.

    import diffusion_distill as dd

    source = dd.data.digits()
    network = dd.UNet(ch=32, emb_ch=64, out_ch=1, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_heads=1)
    teacher = dd.train(dd.Model(network, shape=(8, 8, 1)), source, dd.Denoising(length="200K"))
    students = dd.distill(teacher, source, dd.Tract((1024, 32, 1), length="200K"))
    images = dd.sample(students[1], 16)
    images = dd.sample(teacher, 16, fitted=dd.fit_solver(teacher, "ddim", 10))

Conventions: samples are [batch, *shape] float32, channels last, and images lie in [-1, 1]; a noise level is
(alpha, sigma) with z = alpha·x + sigma·eps; for every process time 1 is noise and 0 is clean.
"""

from diffusion_distill import data, evaluation, report, weights
from diffusion_distill.api import (
    FitSettings,
    SamplerSpec,
    Settings,
    distill,
    evaluate,
    export_weights,
    fit_solver,
    import_weights,
    sample,
    table_for,
    train,
)
from diffusion_distill.denoisers.clipping import Thresholded
from diffusion_distill.denoisers.guidance import ClassifierFree, ClassifierGuided
from diffusion_distill.denoisers.model import Model
from diffusion_distill.denoisers.network import Functions, Network
from diffusion_distill.methods import DISTILLERS, Denoising, Knowledge, Progressive, Tract
from diffusion_distill.networks import ADM, NETWORKS, DiT, SongUNet, UNet
from diffusion_distill.process.processes import (
    PROCESSES,
    VE,
    Cosine,
    DiscreteBetas,
    LinearBeta,
    LinearBetaDiscrete,
    RectifiedFlow,
)
from diffusion_distill.process.time_input import EDMInput, FlowInput, LogsnrInput, TimeOfProcess
from diffusion_distill.solvers import SOLVERS
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.steps import ddim_step, heun_step, midpoint_step, rk4_step
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import OptimizerSettings
from diffusion_distill.version import __version__

__all__ = [
    "ADM",
    "DISTILLERS",
    "NETWORKS",
    "PROCESSES",
    "SOLVERS",
    "VE",
    "Artefact",
    "ClassifierFree",
    "ClassifierGuided",
    "Cosine",
    "Denoising",
    "DiT",
    "DiscreteBetas",
    "EDMInput",
    "FitSettings",
    "FittedSolver",
    "FlowInput",
    "Functions",
    "Knowledge",
    "LinearBeta",
    "LinearBetaDiscrete",
    "LogsnrInput",
    "Model",
    "Network",
    "OptimizerSettings",
    "Progressive",
    "RectifiedFlow",
    "SamplerSpec",
    "Settings",
    "SongUNet",
    "Thresholded",
    "TimeOfProcess",
    "Tract",
    "UNet",
    "__version__",
    "data",
    "ddim_step",
    "distill",
    "evaluate",
    "evaluation",
    "export_weights",
    "fit_solver",
    "heun_step",
    "import_weights",
    "midpoint_step",
    "report",
    "rk4_step",
    "sample",
    "table_for",
    "train",
    "weights",
]
