"""Inputs of networks: checks of shapes and dtypes, and labels as vectors.

U-Nets are called as network(x, time, labels, train, augment), and `DiT` as network(x, time, labels, train), with

    x        [batch, height, width, channels]
    time     [batch], one number per image
    labels   int32 [batch] in [0, num_classes), or num_classes, the null label, which stands for no class and is the
             zero vector; where labels are optional also float [batch, num_classes], or None for zero vectors
    augment  float [batch, augment_dim], how each image was changed (Karras et al. 2022, F.2); None is all zeros

A network that is a guided student is told the scale of guidance beside the labels, as the tree of `base.guided`. It
then has parameters that it has not otherwise, those of `layers.ScaleEmbedding`, called `guidance_emb`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

#: What networks compute in.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def check_images(x: Array, time: Array, levels: int) -> None:
    """Raises ValueError where images or times do not fit a network of so many levels."""
    _check_images(x, time, 2 ** (levels - 1), f"cannot be halved {levels - 1} times", "fewer levels (ch_mult)")


def check_patches(x: Array, time: Array, patch: int) -> None:
    """Raises ValueError where images or times do not fit a network that takes patches of so many pixels."""
    _check_images(x, time, patch, "cannot be cut into patches", "another patch")


def _check_images(x: Array, time: Array, factor: int, problem: str, advice: str) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; it must be [batch, height, width, channels].")
    batch, height, width, _ = x.shape
    if height % factor or width % factor:
        raise ValueError(
            f"Images of {height}x{width} {problem}: height and width must be multiples of {factor}. "
            f"Use {advice} or other images."
        )
    if time.shape != (batch,):
        raise ValueError(f"time has shape {time.shape}; it must be [batch] = ({batch},), one number per image.")


def check_labels(labels: Array | None, batch: int, num_classes: int, optional: bool) -> None:
    """Raises ValueError or TypeError for labels that a network with num_classes > 1 cannot take.

    Args:
      optional: labels may be missing, or vectors.
    """
    if labels is None:
        if not optional:
            raise ValueError(f"labels are missing; a network with num_classes={num_classes} needs int32 [batch].")
        return
    vectors = f" or [batch, num_classes] = ({batch}, {num_classes})" if optional else ""
    if labels.dtype != jnp.int32 and not (vectors and jnp.issubdtype(labels.dtype, jnp.floating)):
        raise TypeError(f"labels have dtype {labels.dtype}; they must be int32. Use labels.astype('int32').")
    allowed = (batch,) if labels.dtype == jnp.int32 else (batch, num_classes)
    if labels.shape != allowed:
        raise ValueError(f"labels have shape {labels.shape}; they must be [batch] = ({batch},){vectors}.")


def check_augment(augment: Array | None, batch: int, augment_dim: int) -> None:
    """Raises ValueError for a description of augmentations that is not [batch, augment_dim]."""
    if augment is not None and not augment_dim:
        raise ValueError("The network takes no augment (augment_dim=0); leave it out, or set augment_dim.")
    if augment is not None and augment.shape != (batch, augment_dim):
        raise ValueError(
            f"augment has shape {augment.shape}; it must be [batch, augment_dim] = ({batch}, {augment_dim})."
        )


def check_rates(network: nn.Module) -> None:
    """Raises ValueError for a network whose `dropout` or `label_dropout` is outside [0, 1)."""
    for name in ("dropout", "label_dropout"):
        if not 0 <= getattr(network, name) < 1:
            raise ValueError(f"{name} is {getattr(network, name)}; it must be in [0, 1).")


def label_vectors(labels: Array | None, batch: int, num_classes: int) -> Array:
    """[batch, num_classes] float32: one-hot rows of int32 labels, vectors as they are, zeros if there are none.

    A label outside [0, num_classes) is no error, its row is zero: that of num_classes, the null label, by intent.
    """
    if labels is None:
        return jnp.zeros((batch, num_classes), jnp.float32)
    if labels.dtype == jnp.int32:
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return labels.astype(jnp.float32)
