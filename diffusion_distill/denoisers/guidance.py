"""Guidance: denoisers that are pulled towards their condition, such as a class or a text, made from denoisers.

With eps_c the conditional and eps_u the unconditional estimate, and s the scale:

    classifier-free     eps = eps_u + s·(eps_c - eps_u)                              arXiv:2207.12598 in its usual form
    classifier          eps = eps_hat - s·sigma·grad_z log p(cond | z, level)        arXiv:2105.05233 section 4.2

No guidance is s = 1 in the first and s = 0 in the second (the first paper writes s = 1 + w). A denoiser returns
x_hat = (z - sigma·eps) / alpha, which at a fixed z and level is affine in eps. In the first, the weights 1 - s and s
add up to 1, so x_hat is combined as eps is. In the second, a term added to eps enters x_hat times -sigma / alpha:

    classifier-free     x_hat = x_u + s·(x_c - x_u)
    classifier          x_hat + s·(sigma² / alpha)·grad_z log p(cond | z, level)

A student can learn what classifier-free guidance makes of its teacher, see `methods.guided`. It is told the scale, and
is never guided again: `AtScale` takes the place of `ClassifierFree`.

A guided estimate can leave the range of the data even where both of its parts are inside. Clip or threshold the guided
estimate, as in `Clipped(ClassifierFree(...))`, not its parts. Wrappers compose in any order, and all of them find the
model inside. Where alpha = 0 a classifier, which sees only noise, says nothing, and its term is left out.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.errors import FlaxError

from diffusion_distill.base import guided
from diffusion_distill.base.arrays import Array, enable_x64, expand, namespace
from diffusion_distill.base.typing import Cond, Data, Labels, Params
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.process.time_input import TimeInput


class LogProb(Protocol):
    """Log-probabilities of conditions by a classifier of noisy samples; a JAX tree, or a plain function."""

    def __call__(self, z: Data, level: Level, cond: Cond, /) -> Array:
        """z [batch, ...] at level ([batch] each) -> log p(cond | z, level), [batch]; differentiable by JAX."""
        ...


class ClassifierFree(struct.PyTreeNode):
    """A denoiser guided by the difference of its conditional and its unconditional estimate.

    Both come from one network call on a batch of twice the size, the unconditional half first. If the unconditional
    estimate has a network of its own, each of the two networks is called once.

    Attributes:
      denoise: the conditional denoiser.
      scale: s, one number or one per sample [batch]. Another Python number does not compile again, except 1, which is
        stored as None: no guidance, and the unconditional estimate is not computed.
      null: the condition of one sample that stands for none, a tree like one sample's condition, such as the label of
        no class; by default the model's, see `conditions`.
      unconditional: another denoiser for the unconditional estimate; it is called with the null condition, or with None
        if none is given.

    Raises:
      ValueError: the scale is not finite, the null condition is missing or unknown to the model, or the model is
        unconditional or guided already; when called, conditions are missing, not like the null condition, or not one
        per sample.
    """

    denoise: Denoise
    scale: Array | None
    null: Cond | None = None
    unconditional: Denoise | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale_unless(1, self.scale))
        _check_null(self.null, self.denoise, self.unconditional)

    def __call__(self, z: Data, level: Level, cond: Cond | None = None) -> Data:
        """x_hat of the shape of z; cond: one condition per sample, a tree of arrays [batch, ...]."""
        cond = _checked(z, cond)
        null = self._null_for(z, cond)
        if self.scale is None:
            return self.denoise(z, level, cond)
        scale = _per_sample(self.scale, z)
        x_u, x_c = self._estimates(z, level, cond, null)
        return x_u + scale * (x_c - x_u)

    def _estimates(self, z: Data, level: Level, cond: Cond, null: Cond | None) -> tuple[Data, Data]:
        """x_hat without and with the conditions."""
        if self.unconditional is not None:
            return self.unconditional(z, level, null), self.denoise(z, level, cond)
        joined = jax.tree.map(_joined, null, cond)
        both = self.denoise(_joined(z, z), Level(*(_joined(a, a) for a in level)), joined)
        return both[: len(z)], both[len(z) :]

    def _null_for(self, z: Data, cond: Cond) -> Cond | None:
        """The null conditions of a batch."""
        if self.null is not None:
            return _repeated(self.null, cond, len(z), shared=self.unconditional is None)
        return None if self.unconditional is not None else conditions.null_like(_model_of(self.denoise), cond)


class ClassifierGuided(struct.PyTreeNode):
    """A denoiser guided by the gradient of a classifier of noisy images.

    Attributes:
      denoise: the denoiser; a conditional one is given the conditions as well.
      log_prob: the classifier. If it is a plain function, jit treats everything it refers to as constant.
      scale: s, one number or one per sample [batch]. The Python number 0 is stored as None: no guidance, and the
        classifier is not called.

    Raises:
      ValueError: the scale is not finite, or the model is guided already; when called, conditions are missing, not one
        per sample, or log-probabilities or scale are not [batch].
    """

    denoise: Denoise
    log_prob: LogProb
    scale: Array | None

    def __post_init__(self) -> None:
        if callable(self.log_prob) and jax.tree_util.all_leaves([self.log_prob]):
            object.__setattr__(self, "log_prob", jax.tree_util.Partial(self.log_prob))
        _check_not_guided(_model_of(self.denoise))
        object.__setattr__(self, "scale", _scale_unless(0, self.scale))

    def __call__(self, z: Data, level: Level, cond: Cond | None = None) -> Data:
        """x_hat of the shape of z; cond: one condition per sample, a tree of arrays [batch, ...]."""
        cond = _checked(z, cond)
        x_hat = self.denoise(z, level, cond)
        if self.scale is None:
            return x_hat
        xp, (alpha, sigma) = namespace(z, *level), level.expand(z)
        factor = xp.where(alpha > 0, sigma**2 / xp.where(alpha > 0, alpha, 1.0), 0.0)
        return x_hat + _per_sample(self.scale, z) * factor * self.gradient(z, level, cond)

    def gradient(self, z: Data, level: Level, cond: Cond) -> Data:
        """grad_z log p(cond | z, level) of each sample, of the shape of z; NumPy in, NumPy out, as precise as z."""

        def total(z: Data) -> Array:  # no sample depends on another, so the gradient of the sum is each one's own
            values = self.log_prob(z, level, cond)
            if np.shape(values) != (len(z),):
                raise ValueError(
                    f"log_prob must give one number per sample, [batch] = ({len(z)},), got {np.shape(values)}. From "
                    "logits [batch, classes], return guidance.label_log_prob(logits, labels)."
                )
            return values.sum()

        if namespace(z, *level) is jnp:
            return jax.grad(total)(z)
        with enable_x64(True):  # on the host, where float64 stays float64
            return np.asarray(jax.grad(total)(z))


class AtScale(struct.PyTreeNode):
    """A guided student at a scale: a denoiser of its teacher's conditions, as every other one.

    Attributes:
      denoise: the student, see `methods.guided`.
      scale: s, one number or one per sample [batch].

    Raises:
      ValueError: the scale is not finite; when called, conditions are missing or not one per sample, or the scale is
        not [batch].
    """

    denoise: Denoise
    scale: Array

    def __post_init__(self) -> None:
        _check_finite(self.scale)

    def __call__(self, z: Data, level: Level, cond: Cond | None = None) -> Data:
        """x_hat of the shape of z; cond: one condition per sample, a tree of arrays [batch, ...]."""
        cond, xp = _checked(z, cond), namespace(z, *level)
        scale = xp.broadcast_to(xp.asarray(_number_or_batch(self.scale, z), z.dtype), (len(z),))
        return self.denoise(z, level, guided.told(scale, cond))


class NoisyLogProb(struct.PyTreeNode):
    """The log-probabilities of labels by a network that classifies noisy samples, for `ClassifierGuided`.

    Attributes:
      params: the network's parameters.
      network: called as network.apply({"params": params}, z, time) -> logits [batch, classes].
      process: maps levels to times.
      time_input: what the network is told of a level, as of a `Model`.
    """

    params: Params
    network: Any = struct.field(pytree_node=False)
    process: Process = struct.field(pytree_node=False)
    time_input: TimeInput = struct.field(pytree_node=False)

    def __call__(self, z: Data, level: Level, cond: Labels) -> Array:
        """log p(cond | z, level), [batch]; cond: labels [batch]."""
        level = Level(*(jnp.broadcast_to(a, (len(z),)) for a in level))
        time, scale = self.time_input.time(level, self.process), self.time_input.scale(level)
        z = z if scale is None else expand(scale, z) * z
        return label_log_prob(self.network.apply({"params": self.params}, z, time), cond)


def check_classifier(log_prob: LogProb, model: Any) -> None:
    """Looks whether a classifier of noisy samples can guide a model; of a `LogProb` of another kind, nothing is known.

    Args:
      model: a `Model`.

    Raises:
      ValueError: the model takes no condition, or the classifier is for samples of another shape or for other classes.
    """
    if not conditions.taken(model):
        raise ValueError(
            "The model to guide takes no labels, so none are drawn for a classifier. In Python, call "
            "ClassifierGuided(denoise, classifier, scale) with labels of the classifier."
        )
    if not isinstance(log_prob, NoisyLogProb):
        return
    z, time = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        logits = jax.eval_shape(log_prob.network.apply, {"params": log_prob.params}, z, time)
    except (ValueError, TypeError, FlaxError) as error:
        raise ValueError(f"The classifier is not for samples of shape {model.shape}: {error}") from error
    if logits.shape[-1] != model.num_classes:
        raise ValueError(
            f"The classifier knows {logits.shape[-1]} classes, the model {model.num_classes}. Guide with a classifier "
            "of the model's own classes."
        )


def label_log_prob(logits: Array, labels: Labels) -> Array:
    """The log softmax of logits [batch, classes] at labels [batch]: the [batch] values that a `LogProb` returns."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], axis=-1)[:, 0]


def _check_finite(scale: Any) -> None:
    """Raises ValueError for a scale that is no finite number; JAX's placeholders for one pass."""
    if isinstance(scale, str) or (isinstance(scale, int | float | np.ndarray) and not np.all(np.isfinite(scale))):
        raise ValueError(f"The scale of guidance must be a finite number, or one per sample, got {scale!r}.")


def _scale_unless(neutral: int, scale: Any) -> Any:
    """The scale, or None for the number that means no guidance; JAX's placeholders for it are returned as they are."""
    _check_finite(scale)
    return None if isinstance(scale, int | float) and scale == neutral else scale


def _check_null(null: Cond | None, denoise: Denoise, unconditional: Denoise | None) -> None:
    """Raises ValueError for a model that takes no condition, and for a null condition that is missing or unknown."""
    model = _model_of(denoise)
    if model is not None and not conditions.taken(model):
        raise ValueError("The model to guide is unconditional. Use one trained with conditions.")
    _check_not_guided(model)
    if null is None:
        if unconditional is None and (model is None or conditions.null_of(model) is None):
            raise ValueError(
                "Classifier-free guidance needs `null`, the condition that stands for none (of labels, that of no "
                "class), or a denoiser `unconditional`. A model can name its own: Model(..., cond=..., null=...)."
            )
        return
    classes = getattr(model if unconditional is None else _model_of(unconditional), "num_classes", None)
    whole = hasattr(null, "__index__") and not isinstance(null, bool)
    label = isinstance(null, bool | int | float | str | np.generic)
    if label and not (whole and 0 <= int(null) <= (classes or np.inf)):
        allowed = "at least 0" if classes is None else f"in [0, {classes}], where {classes} is the zero vector"
        raise ValueError(f"The null label must be a whole number {allowed}, got {null!r}.")


def _check_not_guided(model: Any) -> None:
    """Raises ValueError for a guided student."""
    if getattr(model, "guided", None):
        raise ValueError(
            "The model is guided already: it is a student that is told the scale. Sample and distil it as it is; of "
            'sampling, guidance={"scale": s} is what it is told. To guide anew, take its teacher.'
        )


def _model_of(denoise: Any) -> Any:
    """The model of a denoiser, also inside a wrapper such as `Clipped`; None if it is unknown."""
    while hasattr(denoise, "denoise"):
        denoise = denoise.denoise
    model = getattr(denoise, "model", None)
    return model if hasattr(model, "num_classes") else None


def _checked(z: Data, cond: Cond | None) -> Cond:
    """The conditions; raises ValueError if there are none, or not one for each sample."""
    if cond is None:
        raise ValueError(f"cond is missing: guidance needs a condition per sample, [batch, ...], batch = {len(z)}.")
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(cond)]
    if any(shape[:1] != (len(z),) for shape in shapes):
        raise ValueError(
            f"cond must be one condition per sample, [batch, ...] with [batch] = ({len(z)},), got shape "
            f"{', '.join(map(str, shapes))}."
        )
    return cond


def _repeated(null: Cond, cond: Cond, batch: int, shared: bool) -> Cond:
    """One null condition for each sample, like the conditions with which it shares a batch (`shared`)."""

    def each(null: Array, leaf: Array) -> Array:
        if shared and (np.shape(null) != leaf.shape[1:] or _whole(null) != _whole(leaf)):
            raise ValueError(
                f"cond must be like the null condition, which has shape {np.shape(null)} and type "
                f"{_type(null)}, got shape {leaf.shape}, type {leaf.dtype}."
            )
        xp = namespace(leaf, null)
        return xp.broadcast_to(xp.asarray(null, leaf.dtype), (batch, *np.shape(null)))

    if jax.tree.structure(null) == jax.tree.structure(cond):
        return jax.tree.map(each, null, cond)
    if shared:
        raise ValueError(f"cond must be a tree like the null condition, {jax.tree.structure(null)}.")
    return jax.tree.map(lambda one: np.broadcast_to(one, (batch, *np.shape(one))), null)


def _type(a: Array) -> np.dtype:
    return a.dtype if hasattr(a, "dtype") else np.result_type(a)


def _whole(a: Array) -> bool:
    return jnp.issubdtype(_type(a), jnp.integer)


def _per_sample(scale: Array, z: Data) -> Array:
    """The scale with axes appended, so that it multiplies images shaped like z."""
    return expand(_number_or_batch(scale, z), z)


def _number_or_batch(scale: Array, z: Data) -> Array:
    """The scale, if it is one number or one for each sample; raises ValueError otherwise."""
    if np.shape(scale) not in ((), (len(z),)):
        raise ValueError(f"scale must be a number or [batch] = ({len(z)},), got shape {np.shape(scale)}.")
    return scale


def _joined(first: Array, second: Array) -> Array:
    """Joins two batches along the first axis; a scalar, which holds for all samples, is returned as it is."""
    return namespace(first, second).concatenate([first, second]) if np.ndim(first) else first
