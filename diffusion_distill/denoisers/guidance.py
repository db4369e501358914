"""Guidance: denoisers that are pulled towards a class, made from denoisers.

With eps_c the conditional and eps_u the unconditional estimate, and s the scale:

    classifier-free     eps = eps_u + s·(eps_c - eps_u)                              arXiv:2207.12598 in its usual form
    classifier          eps = eps_hat - s·sigma·grad_z log p(label | z, level)       arXiv:2105.05233 section 4.2

No guidance is s = 1 in the first and s = 0 in the second (the first paper writes s = 1 + w). A denoiser returns
x_hat = (z - sigma·eps) / alpha, which at a fixed z and level is affine in eps. In the first, the weights 1 - s and s
add up to 1, so x_hat is combined as eps is. In the second, a term added to eps enters x_hat times -sigma / alpha:

    classifier-free     x_hat = x_u + s·(x_c - x_u)
    classifier          x_hat + s·(sigma² / alpha)·grad_z log p(label | z, level)

A guided estimate can leave [-1, 1] even where both of its parts are inside. Clip or threshold the guided estimate,
as in `Clipped(ClassifierFree(...))`, not its parts.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion_distill.base.arrays import Array, enable_x64, expand, namespace
from diffusion_distill.base.typing import Image, Labels
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level


class LogProb(Protocol):
    """Log-probabilities of labels by a classifier of noisy images; a JAX tree, so that jit sees its parameters."""

    def __call__(self, z: Image, level: Level, labels: Labels) -> Array:
        """z [batch, h, w, c] at level ([batch] each) -> log p(label | z, level), [batch]; differentiable by JAX."""
        ...


class ClassifierFree(struct.PyTreeNode):
    """A denoiser guided by the difference of its conditional and its unconditional estimate.

    Both come from one network call on a batch of twice the size, the unconditional half first. If the unconditional
    estimate has a network of its own, each of the two networks is called once.

    Attributes:
      denoise: the conditional denoiser.
      scale: s, one number or one per sample [batch]. Another Python number does not compile again, except 1, which is
        stored as None: no guidance, and the unconditional estimate is not computed.
      null_label: the label that means "no class". It is `num_classes`, whose one-hot row is zero, for a model trained
        with `label_dropout`; or one of the classes, if the model was trained with that one as null label.
      unconditional: another denoiser for the unconditional estimate; it is called with the null label, or with None if
        there is no null label.

    Raises:
      ValueError: the scale is not finite, the null label is missing or unknown to the model, or the model is
        unconditional; when called, labels are missing, or scale or labels are not [batch].
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
      log_prob: the classifier. If it is a plain function, jit treats everything it refers to as constant.
      scale: s, one number or one per sample [batch]. The Python number 0 is stored as None: no guidance, and the
        classifier is not called.

    Raises:
      ValueError: the scale is not finite; when called, labels are missing, or log-probabilities, labels or scale are
        not [batch].
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
    """The log softmax of logits [batch, classes] at labels [batch]: the [batch] values that a `LogProb` returns."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], axis=-1)[:, 0]


def _scale_unless(neutral: int, scale: Any) -> Any:
    """The scale, or None for the number that means no guidance; JAX's placeholders for it are returned as they are."""
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
    """The number of classes of a denoiser's model, also inside a wrapper such as `Clipped`; None if it is unknown."""
    while hasattr(denoise, "denoise"):
        denoise = denoise.denoise
    return getattr(getattr(denoise, "model", None), "num_classes", None)


def _labels_for(z: Image, labels: Labels | None, shared: bool) -> Labels:
    """The labels; if `shared`, they are joined with null labels into one batch and must be whole numbers [batch]."""
    if labels is None:
        raise ValueError(f"labels are missing: guidance needs a class per sample, int32 [batch] = ({len(z)},).")
    shape = np.shape(labels)
    if shape[:1] != (len(z),) or (shared and (len(shape) != 1 or labels.dtype.kind not in "iu")):
        raise ValueError(
            f"labels must be whole numbers, [batch] = ({len(z)},), got shape {shape}, type {labels.dtype}."
        )
    return labels


def _per_sample(scale: Array, z: Image) -> Array:
    """The scale with axes appended, so that it multiplies images shaped like z."""
    if np.shape(scale) not in ((), (len(z),)):
        raise ValueError(f"scale must be a number or [batch] = ({len(z)},), got shape {np.shape(scale)}.")
    return expand(scale, z)


def _joined(first: Array, second: Array) -> Array:
    """Joins two batches along the first axis; a scalar, which holds for all samples, is returned as it is."""
    return namespace(first, second).concatenate([first, second]) if np.ndim(first) else first


def _filled(labels: Labels, batch: int, value: int) -> Labels:
    """One label repeated for the whole batch, with the type and the devices of `labels`."""
    kind = labels.dtype if labels.dtype.kind in "iu" else np.int32
    return namespace(labels).full((batch,), value, kind)
