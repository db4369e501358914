"""A denoiser that was given as it is, in the place of a network: for sampling, fitting and as a teacher.

It is told the level itself, its output is x_hat, and the denoiser, a JAX tree, takes the place of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Data, Key, Params
from diffusion_distill.denoisers.network import Network
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process


@dataclass(frozen=True)
class Given(Network):
    """The network whose parameters are a denoiser.

    Attributes:
      num_classes: of the labels that the denoiser takes; 1 for none.
    """

    num_classes: int = 1
    kind: ClassVar[str] = "denoiser"

    def init(self, key: Key, z: Data, time: Level, cond: Cond | None) -> Params:
        """There are no fresh ones.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "A denoiser that was given as a function cannot be trained or saved. To distil it, give the student a "
            "network of its own: distill(teacher, source, method, student=Model(network, ...))."
        )

    def apply(self, params: Params, z: Data, time: Level, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """x_hat."""
        return params(z, time, cond)


@dataclass(frozen=True)
class WholeLevel:
    """The time input of such a network: the level itself."""

    def time(self, level: Level, process: Process) -> Level:
        """The level."""
        return level

    def scale(self, level: Level) -> None:
        """None: z as it is."""
