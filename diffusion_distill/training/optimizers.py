"""The optimizer: global-norm clipping and Adam from optax, without the learning rate.

The rate is an argument of the training step (parameters move by -rate·update), so phases with other rates
and lengths share one compiled step. Clipping acts on the gradient of the mean over the global batch; BTD's
code clips each device's share before averaging, which depends on the number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import optax


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam and clipping.

    Attributes:
      grad_clip: largest global gradient norm; 0 for no clipping.
      weight_decay: decoupled, scaled by the learning rate.

    Raises:
      ValueError: a negative setting.
    """

    grad_clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if min(self.grad_clip, self.weight_decay, self.eps) < 0 or not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"Optimizer settings must not be negative, b1 and b2 below 1; got {self}.")


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The transformation gradient -> update; apply it as parameters - learning_rate·update."""
    parts = [optax.clip_by_global_norm(settings.grad_clip)] if settings.grad_clip else []
    parts.append(optax.scale_by_adam(settings.b1, settings.b2, settings.eps))
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay))
    return optax.chain(*parts)
