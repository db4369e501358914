"""A network in PyTorch as a denoiser: (z, level) -> x_hat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import SIGMA_DATA, output_channels, to_x
from diffusion_distill.process.processes import DiscreteBetas, Process
from diffusion_distill.process.time_input import TimeInput


@dataclass(frozen=True)
class Denoiser:
    """A denoiser of a network that predicts x, eps, v, a velocity or anything else of `PREDICTIONS` with one output.

    Attributes:
      network: (inputs [batch, channels, ...], times [batch]) -> output of the shape of its inputs. Conditions and
        guidance are its own matter.
      prediction: what the output stands for.
      process: what times belong to which levels.
      inputs: how the network is told the level.
      sigma_data: standard deviation of the data, for 'edm' and 'consistency'.
      dtype: precision of the network's inputs; None for that of z.

    Raises:
      ValueError: an unknown prediction, or one with several outputs: hand over the one that is used; or noise predicted
        where the process has no signal.
    """

    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    prediction: str
    process: Process
    inputs: TimeInput
    sigma_data: float = SIGMA_DATA
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if output_channels(self.prediction, 1) > 1:
            raise ValueError(f"A network of prediction {self.prediction!r} has several outputs: return one.")
        if isinstance(self.process, DiscreteBetas):
            self.process.check_prediction(self.prediction)

    def __call__(self, z: torch.Tensor, level: Level) -> torch.Tensor:
        """z [batch, channels, ...] at a level of two numbers -> x_hat, in the precision of z."""
        level = Level(*map(np.float64, level))  # arrays of NumPy without axes do not multiply tensors
        scale = self.inputs.scale(level)
        told = torch.full((len(z),), float(self.inputs.time(level, self.process)), device=z.device)
        seen = z if scale is None else scale * z
        output = self.network(seen.to(self.dtype or z.dtype), told)
        return to_x(self.prediction, output.to(z.dtype), z, level, self.sigma_data)
