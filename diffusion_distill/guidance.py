"""Guidance: denoisers that are pulled towards a class, made from denoisers.

With eps_c the conditional and eps_u the unconditional estimate, and s the scale:

    classifier-free     eps = eps_u + s·(eps_c - eps_u)                              arXiv:2207.12598 in its usual form
    classifier          eps = eps_hat - s·sigma·grad_z log p(label | z, level)       arXiv:2105.05233 section 4.2

There s = 1 is no guidance in the first and s = 0 in the second (the paper of the first writes s = 1 + w). Denoisers
answer x_hat = (z - sigma·eps) / alpha, which at a fixed z and level is affine in eps. The weights 1 - s and s of the
first add up to 1, so z keeps its share; what the second adds to eps comes into x_hat times -sigma / alpha:

    classifier-free     x_hat = x_u + s·(x_c - x_u)
    classifier          x_hat + s·(sigma² / alpha)·grad_z log p(label | z, level)

Guidance leaves [-1, 1] even where both estimates are within: clip or threshold what it answers, as in
`Clipped(ClassifierFree(...))`, not what it is made of.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion_distill.arrays import Array, enable_x64, expand, namespace
from diffusion_distill.levels import Level
from diffusion_distill.typing import Denoise, Image, Labels


class LogProb(Protocol):
    """What a classifier says about noisy images. Must be a JAX tree if it has parameters, so that jit sees them."""

    def __call__(self, z: Image, level: Level, labels: Labels) -> Array:
        """z [batch, h, w, c] at level ([batch] each) -> log p(label | z, level), [batch]; differentiable by JAX."""
        ...


class ClassifierFree(struct.PyTreeNode):
    """A denoiser guided by the difference of its conditional and its unconditional estimate.

    Both come from one call of the network on twice the batch, the unconditional half first; with a network of their own
    for the unconditional estimate, from one call of each.

    Attributes:
      denoise: the conditional denoiser.
      scale: s, a number or one per sample [batch]. A Python number is a value like any other to jit (another does not
        compile again), except 1: it is kept as None, which means no guidance and no unconditional estimate.
      null_label: the label of no class. For a model of `num_classes` classes one of them, if it was trained as such, or
        `num_classes`, whose one-hot row is zero, as `label_dropout` trains.
      unconditional: a denoiser for the unconditional estimate, which is given the null label, or None without one.

    Raises:
      ValueError: a scale that is not finite, no null label where one is needed or one the model does not have, an
        unconditional model to guide; when called, missing labels or a scale or labels that are not [batch].
    """

    denoise: Denoise
    scale: Array | None
    null_label: int | None = struct.field(pytree_node=False, default=None)
    unconditional: Denoise | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale_unless(1, self.scale))
        _check_null_label(self.null_label, self.denoise, self.unconditional)

    def __call__(self, z: Image, level: Level, labels: Labels | None = None) -> Image:
        """x_hat of the shape of z; labels [batch] int32."""
        labels = _labels_for(z, labels, shared=self.unconditional is None)
        if self.scale is None:
            return self.denoise(z, level, labels)
        scale = _per_sample(self.scale, z)
        x_u, x_c = self._estimates(z, level, labels)
        return x_u + scale * (x_c - x_u)

    def _estimates(self, z: Image, level: Level, labels: Labels) -> tuple[Image, Image]:
        """x_hat without and with the labels."""
        null = None if self.null_label is None else _filled(labels, len(z), self.null_label)
        if self.unconditional is not None:
            return self.unconditional(z, level, null), self.denoise(z, level, labels)
        both = self.denoise(_joined(z, z), Level(*(_joined(a, a) for a in level)), _joined(null, labels))
        return both[: len(z)], both[len(z) :]


class ClassifierGuided(struct.PyTreeNode):
    """A denoiser guided by the gradient of a classifier of noisy images.

    Attributes:
      denoise: the denoiser; a class-conditional one is given the labels as well.
      log_prob: the classifier. A plain function is taken as it is, with what it holds fixed to jit.
      scale: s, a number or one per sample [batch]; the Python number 0 is kept as None: no guidance, no classifier.

    Raises:
      ValueError: a scale that is not finite; when called, missing labels, log-probabilities, labels or a scale that
        are not [batch].
    """

    denoise: Denoise
    log_prob: LogProb
    scale: Array | None

    def __post_init__(self) -> None:
        if callable(self.log_prob) and jax.tree_util.all_leaves([self.log_prob]):
            object.__setattr__(self, "log_prob", jax.tree_util.Partial(self.log_prob))
        object.__setattr__(self, "scale", _scale_unless(0, self.scale))

    def __call__(self, z: Image, level: Level, labels: Labels | None = None) -> Image:
        """x_hat of the shape of z; labels [batch] int32."""
        labels = _labels_for(z, labels, shared=False)
        x_hat = self.denoise(z, level, labels)
        if self.scale is None:
            return x_hat
        alpha, sigma = level.expand(z)
        return x_hat + _per_sample(self.scale, z) * (sigma**2 / alpha) * self.gradient(z, level, labels)

    def gradient(self, z: Image, level: Level, labels: Labels) -> Image:
        """grad_z log p(label | z, level) of each sample, of the shape of z; NumPy in, NumPy out, as precise as z."""

        def total(z: Image) -> Array:  # no sample depends on another, so the gradient of the sum is each one's own
            values = self.log_prob(z, level, labels)
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


def label_log_prob(logits: Array, labels: Labels) -> Array:
    """log softmax of logits [batch, classes] at labels [batch]: what a classifier's `log_prob` returns, [batch]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], axis=-1)[:, 0]


def _scale_unless(neutral: int, scale: Any) -> Any:
    """The scale, or None for the number that means no guidance; what JAX puts in its place meanwhile passes through."""
    if isinstance(scale, str) or (isinstance(scale, int | float | np.ndarray) and not np.all(np.isfinite(scale))):
        raise ValueError(f"The scale of guidance must be a finite number, or one per sample, got {scale!r}.")
    return None if isinstance(scale, int | float) and scale == neutral else scale


def _check_null_label(null_label: int | None, denoise: Denoise, unconditional: Denoise | None) -> None:
    if _num_classes(denoise) == 1:
        raise ValueError("The model to guide is unconditional (num_classes=1). Use one trained with labels.")
    if null_label is None:
        if unconditional is None:
            raise ValueError(
                "Classifier-free guidance needs null_label, the label of no class, or a denoiser `unconditional`."
            )
        return
    classes = _num_classes(denoise if unconditional is None else unconditional)
    whole = hasattr(null_label, "__index__") and not isinstance(null_label, bool)
    if not whole or null_label < 0 or (classes is not None and null_label > classes):
        allowed = "at least 0" if classes is None else f"in [0, {classes}], where {classes} is the zero vector"
        raise ValueError(f"null_label must be a whole number {allowed}, got {null_label!r}.")


def _num_classes(denoise: Any) -> int | None:
    """The number of classes of the model in a denoiser, be it clipped; None if there is no telling."""
    while hasattr(denoise, "denoise"):
        denoise = denoise.denoise
    return getattr(getattr(denoise, "model", None), "num_classes", None)


def _labels_for(z: Image, labels: Labels | None, shared: bool) -> Labels:
    """The labels; where they must stand beside null labels, `shared`, they must be whole numbers [batch]."""
    if labels is None:
        raise ValueError(f"labels are missing: guidance needs a class per sample, int32 [batch] = ({len(z)},).")
    shape = np.shape(labels)
    if shape[:1] != (len(z),) or (shared and (len(shape) != 1 or labels.dtype.kind not in "iu")):
        raise ValueError(
            f"labels must be whole numbers, [batch] = ({len(z)},), got shape {shape}, type {labels.dtype}."
        )
    return labels


def _per_sample(scale: Array, z: Image) -> Array:
    """The scale, to be multiplied with images like z."""
    if np.shape(scale) not in ((), (len(z),)):
        raise ValueError(f"scale must be a number or [batch] = ({len(z)},), got shape {np.shape(scale)}.")
    return expand(scale, z)


def _joined(first: Array, second: Array) -> Array:
    """Two batches as one; a scalar, the same for all samples, stays."""
    return namespace(first, second).concatenate([first, second]) if np.ndim(first) else first


def _filled(labels: Labels, batch: int, value: int) -> Labels:
    """The same label [batch], where and of the type `labels` are."""
    kind = labels.dtype if labels.dtype.kind in "iu" else np.int32
    return namespace(labels).full((batch,), value, kind)
