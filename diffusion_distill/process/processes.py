"""A noise process maps times to levels: the only place that knows what a time t means.

    family                  alpha, sigma                     file
    variance preserving     alpha² + sigma² = 1              vp.py, vp_discrete.py
    variance exploding      alpha = 1                        ve.py
    rectified flow          alpha + sigma = 1                flow.py

Time runs from 1, the noisy end, to 0, the clean end. A process has two methods, and everything else (grids, targets,
solvers, losses) takes their levels. A new process is such a class and one line in `PROCESSES`, by whose name artefacts
and configs know it:

    @dataclass(frozen=True)
    class Squared:
        def level(self, t):
            return Level((1 - t) ** 2, 2 * t)

        def time(self, level):
            ...  # solve sigma/alpha = 2·t / (1 - t)²
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from diffusion_distill.base.arrays import Array
from diffusion_distill.process.flow import RectifiedFlow
from diffusion_distill.process.levels import Level
from diffusion_distill.process.ve import VE
from diffusion_distill.process.vp import Cosine, IDDPMCosine, LinearBeta
from diffusion_distill.process.vp_discrete import DiscreteBetas, LinearBetaDiscrete


@runtime_checkable
class Process(Protocol):
    """A frozen, hashable value that maps times to levels."""

    def level(self, t: Array) -> Level:
        """The level at time t in [0, 1], elementwise; NumPy in, NumPy out (float64), JAX in, JAX out (float32)."""
        ...

    def time(self, level: Level) -> Array:
        """The inverse of `level`. Of a level of another process, the time with the same sigma/alpha."""
        ...


PROCESSES: dict[str, type] = {
    "cosine": Cosine,
    "linear": LinearBeta,
    "linear_discrete": LinearBetaDiscrete,
    "discrete": DiscreteBetas,
    "iddpm_cosine": IDDPMCosine,
    "ve": VE,
    "flow": RectifiedFlow,
}
