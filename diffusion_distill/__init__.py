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

A name is imported when it is first asked for, so that `diffusion_distill.torch` needs no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusion_distill.version import __version__

if TYPE_CHECKING:
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
    from diffusion_distill.methods import DISTILLERS, Denoising, Guided, Knowledge, Progressive, Tract
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

#: Module -> names that stand here too; they are imported above for type checkers.
NAMES = {
    "api": (
        "FitSettings",
        "SamplerSpec",
        "Settings",
        "distill",
        "evaluate",
        "export_weights",
        "fit_solver",
        "import_weights",
        "sample",
        "table_for",
        "train",
    ),
    "denoisers.clipping": ("Thresholded",),
    "denoisers.guidance": ("ClassifierFree", "ClassifierGuided"),
    "denoisers.model": ("Model",),
    "denoisers.network": ("Functions", "Network"),
    "methods": ("DISTILLERS", "Denoising", "Guided", "Knowledge", "Progressive", "Tract"),
    "networks": ("ADM", "NETWORKS", "DiT", "SongUNet", "UNet"),
    "process.processes": (
        "PROCESSES",
        "VE",
        "Cosine",
        "DiscreteBetas",
        "LinearBeta",
        "LinearBetaDiscrete",
        "RectifiedFlow",
    ),
    "process.time_input": ("EDMInput", "FlowInput", "LogsnrInput", "TimeOfProcess"),
    "solvers": ("SOLVERS",),
    "solvers.fitted": ("FittedSolver",),
    "solvers.steps": ("ddim_step", "heun_step", "midpoint_step", "rk4_step"),
    "training.artefact": ("Artefact",),
    "training.optimizers": ("OptimizerSettings",),
}
#: Rooms that are a name themselves.
ROOMS = ("data", "evaluation", "report", "weights")
#: Rooms whose files can be asked for too, such as `dd.process.levels`.
INNER = ("api", "base", "denoisers", "formats", "methods", "networks", "process", "solvers", "training")
_MODULES = {name: f"{__name__}.{module}" for module, names in NAMES.items() for name in names}

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
    "Guided",
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


def __getattr__(name: str) -> Any:
    """Imports a name of the package (PEP 562)."""
    if name in INNER:
        for module in sorted({*_MODULES.values()}):  # they bring the files of these rooms
            import_module(module)
    if name in (*ROOMS, *INNER, "torch"):
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *INNER, "torch"})
