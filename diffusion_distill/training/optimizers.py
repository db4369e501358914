"""The optimizer, from optax, without the learning rate.

The rate is an argument of the training step (parameters move by -rate·update), so phases with other rates
and lengths share one compiled step. With g the gradient and p the parameters,

    adam       m_hat / (sqrt(v_hat) + eps) + weight_decay·p         decay decoupled (arXiv:1711.05101)
    momentum   u = b1·u + (g + weight_decay·p)                      decay as part of the gradient
    nesterov   (g + weight_decay·p) + b1·u

as in BTD's program. Clipping to a global norm acts on the gradient of the mean over the global batch; BTD
clips the gradient of each device's share before averaging, which depends on the number of devices
(clip_scope='shard', done in `training.gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from diffusion_distill.base.errors import choose, finite_number
from diffusion_distill.base.typing import Params

if TYPE_CHECKING:
    import optax

RULES = ("adam", "momentum", "nesterov")
CLIP_SCOPES = ("global", "shard")


@dataclass(frozen=True)
class OptimizerSettings:
    """The rule and its clipping.

    Attributes:
      rule: one of `RULES`.
      grad_clip: largest global gradient norm; 0 for no clipping.
      clip_scope: what is clipped, the gradient of the 'global' batch or of each device's 'shard' of it.
      clip_eps: added to the norm when clipping; 0 in BTD's program, 1e-6 in TRACT's (PyTorch's).
      b1: decay of the first moment; the published value of both rules with momentum is 0.9.
      b2, eps: adam's alone.
      weight_decay: scaled by the learning rate.

    Raises:
      ValueError: a negative setting, an unknown rule or scope.
    """

    rule: str = "adam"
    grad_clip: float = 1.0
    clip_scope: str = "global"
    clip_eps: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        choose("optimizer rule", self.rule, dict.fromkeys(RULES))
        choose("clip_scope", self.clip_scope, dict.fromkeys(CLIP_SCOPES))
        for name in ("grad_clip", "clip_eps", "weight_decay", "eps", "b1", "b2"):
            finite_number(f"Of an optimizer's settings {name}", getattr(self, name))
        if not (self.b1 < 1 and self.b2 < 1):
            raise ValueError(f"Of an optimizer's settings b1 and b2 must be below 1; got {self}.")


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The transformation gradient -> update; apply it as parameters - learning_rate·update."""
    import optax  # takes a tenth of a second

    clip = [make_clip(settings)] if settings.clip_scope == "global" else []
    decay = [optax.add_decayed_weights(settings.weight_decay)] if settings.weight_decay else []
    if settings.rule == "adam":
        return optax.chain(*clip, optax.scale_by_adam(settings.b1, settings.b2, settings.eps), *decay)
    return optax.chain(*clip, *decay, optax.trace(settings.b1, nesterov=settings.rule == "nesterov"))


def make_clip(settings: OptimizerSettings) -> optax.GradientTransformation:
    """gradient·min(1, grad_clip / (norm + clip_eps)); the identity for grad_clip 0."""
    import optax

    if not settings.grad_clip:
        return optax.identity()

    def clip(gradient: Params, params: Params | None = None) -> Params:
        factor = jnp.minimum(1, settings.grad_clip / (optax.tree.norm(gradient) + settings.clip_eps))
        return jax.tree.map(lambda g: factor * g, gradient)

    return optax.stateless(clip)
