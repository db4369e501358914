"""Solvers, plain and fitted, for PyTorch and for pipelines of diffusers. Nothing here needs JAX.

    from diffusion_distill.torch import DistilledODEScheduler, fit

    fitted = fit(pipeline, 10, prompt=prompts)
    pipeline.scheduler = DistilledODEScheduler.from_config(pipeline.scheduler.config, fitted=fitted)
    images = pipeline(prompts, num_inference_steps=10).images

Tables are the same NumPy arrays that JAX runs (solvers/), and a row is computed by the same function (solvers/rows.py).
A level here is a pair of numbers, the same for the whole batch; samples are [batch, channels, ...]. The engine and the
denoiser need PyTorch only, the others diffusers too, so names are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_distill.torch.denoiser import Denoiser
    from diffusion_distill.torch.engine import run
    from diffusion_distill.torch.fitting import fit
    from diffusion_distill.torch.levels import choose_levels
    from diffusion_distill.torch.scheduler import DistilledODEScheduler

NAMES = {
    "denoiser": ("Denoiser",),
    "engine": ("run",),
    "fitting": ("fit",),
    "levels": ("choose_levels",),
    "scheduler": ("DistilledODEScheduler",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in NAMES.items() for name in names}

__all__ = ["Denoiser", "DistilledODEScheduler", "choose_levels", "fit", "run"]


def __getattr__(name: str) -> Any:
    """Imports a name of the room (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "diffusers"):
            raise
        message = f"{name} needs {error.name}: pip install 'diffusion_distill[torch]'."
        raise ModuleNotFoundError(message, name=error.name) from error
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
