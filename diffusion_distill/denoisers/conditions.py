"""Conditions: what a sample is to be, such as its class or a text, as a tree of arrays [batch, ...].

A model says what it takes. If its network has an attribute num_classes above 1, that is a label, int32 [batch], and
the null condition, which stands for no class, is the label num_classes, whose one-hot row is zero. Otherwise it is what
`Model(cond=...)` describes, the condition of one sample, and `Model(null=...)` is its null condition. The null
condition is what classifier-free guidance calls the network with (Ho & Salimans, arXiv:2207.12598).

A guided student, `Model(guided=(low, high))`, is told the scale of guidance beside the condition, see `base.guided`.
Data and users give the condition alone, as its teacher takes it: the scale is added here in training, and by
`guidance.AtScale` in sampling.

In training, conditions are dropped, and scales drawn, here and nowhere else: in the batch, before any loss, so that
student, teacher and self-teacher see the same ones, whatever the network.
"""

from __future__ import annotations

from math import isfinite
from numbers import Real
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base import guided
from diffusion_distill.base.arrays import Array
from diffusion_distill.base.seeds import check_seed
from diffusion_distill.base.trees import Fixed, names
from diffusion_distill.base.typing import Cond, Key

#: Kinds of numbers; whole ones may stand for real ones.
KINDS = (jnp.integer, jnp.floating, jnp.bool_, jnp.generic)
#: What the key of an update is folded with for its dropped conditions; other streams are folded with small numbers.
STREAM = 0x4C41424C
#: The same, for the scales of guided students.
SCALES = 0x5343414C


class Conditional(Protocol):
    """What is asked of a model here."""

    @property
    def num_classes(self) -> int:
        """Above 1 for a model of labels."""
        ...

    @property
    def cond(self) -> Fixed | None:
        """One sample's condition as `jax.ShapeDtypeStruct`s, for a model of other conditions."""
        ...

    @property
    def null(self) -> Fixed | None:
        """The null condition of one sample, if there is one."""
        ...

    @property
    def guided(self) -> tuple[float, float] | None:
        """Of a guided student, the least and the largest scale that it learned."""
        ...


def described(cond: Any) -> Fixed | None:
    """The shapes and types of one sample's condition, from arrays, numbers or `jax.ShapeDtypeStruct`s."""
    if cond is None or isinstance(cond, Fixed):
        return cond

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        kind = jax.dtypes.canonicalize_dtype(np.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype)
        return jax.ShapeDtypeStruct(np.shape(leaf), kind)

    return Fixed(jax.tree.map(struct, cond))


def null_for(null: Any, cond: Fixed | None) -> Fixed | None:
    """A null condition as NumPy arrays of the types that the condition has.

    Raises:
      ValueError: it is not like the condition of one sample.
    """
    if null is None or isinstance(null, Fixed):
        return null
    if cond is None:
        raise ValueError(
            "null was given without cond. Give cond too, the condition of one sample; a network with num_classes has "
            "the null label num_classes by itself."
        )
    _compare("null", null, cond.tree, "like cond, the condition of one sample, without a batch axis")
    return Fixed(jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), null, cond.tree))


def taken(model: Conditional) -> bool:
    """Whether a model takes a condition."""
    return model.cond is not None or model.num_classes > 1


def structs(model: Conditional, count: int) -> Cond | None:
    """The shapes and types of the conditions of `count` samples; None for an unconditional model.

    Of a guided student without the scale, which `told` has.
    """
    if model.cond is not None:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), model.cond.tree)
    return jax.ShapeDtypeStruct((count,), jnp.int32) if model.num_classes > 1 else None


def told(model: Conditional, count: int) -> Cond | None:
    """The shapes and types of what the network is told for `count` samples: of a guided student with the scale."""
    cond = structs(model, count)
    return cond if model.guided is None else guided.told(jax.ShapeDtypeStruct((count,), jnp.float32), cond)


def zeros(model: Conditional) -> Cond | None:
    """What the network is told of one sample, [1, ...], all zeros: what parameters are initialised with."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), told(model, 1))


def null_of(model: Conditional) -> Cond | None:
    """The null condition of one sample; None if the model has none."""
    if model.cond is not None:
        return None if model.null is None else model.null.tree
    return np.int32(model.num_classes) if model.num_classes > 1 else None


def check(model: Conditional, cond: Cond | None, count: int, what: str = "cond") -> None:
    """Looks whether conditions are what a model takes for `count` samples.

    Args:
      what: how the errors call them.

    Raises:
      ValueError: they are missing, unwanted, or of other names, shapes or types, or labels that the model has not.
    """
    wanted = structs(model, count)
    if wanted is None:
        if cond is not None:
            raise ValueError(f"{what} was given, but the model is unconditional. Leave it out.")
        return
    if cond is None:
        raise ValueError(f"{what} is missing: the model takes {shown(wanted)}. Give it.")
    if model.cond is not None:
        _compare(what, cond, wanted, f"one per sample, for {count} samples")
        return
    labels = np.asarray(cond)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{what} must be {count} whole numbers, got shape {labels.shape}, type {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= model.num_classes:
        raise ValueError(
            f"{what} must be labels in [0, {model.num_classes - 1}], got values from {labels.min()} to {labels.max()}."
        )


def for_samples(model: Conditional, count: int, cond: Cond | None, seed: int) -> Cond | None:
    """The conditions of `count` samples.

    Args:
      cond: a tree of arrays [count, ...]; None draws labels uniformly.
      seed: of labels that are drawn.

    Returns:
      The given ones, checked, in the model's types; None for an unconditional model.

    Raises:
      ValueError: as `check`, and for conditions other than labels that are missing.
    """
    if cond is None and model.cond is None and model.num_classes > 1:
        return np.random.default_rng(check_seed(seed)).integers(model.num_classes, size=count, dtype=np.int32)
    if model.cond is None and cond is not None:
        cond = np.asarray(cond)  # labels may be a list
    check(model, cond, count)
    if cond is None:
        return None
    return jax.tree.map(lambda a, like: np.asarray(a, like.dtype), cond, structs(model, count))


def repeated(cond: Cond | None, count: int) -> Cond | None:
    """Conditions repeated from the first on, or cut, to `count` samples."""
    return jax.tree.map(lambda a: np.resize(a, (count, *np.shape(a)[1:])), cond)


def null_like(model: Conditional, cond: Cond) -> Cond:
    """The null conditions of a batch: of the shapes, types and devices of its conditions.

    Raises:
      ValueError: the model has no null condition.
    """
    null = null_of(model)
    if null is None:
        raise ValueError(
            "The model has no null condition, which guidance and dropped conditions need. Give it one: "
            "Model(..., cond=..., null=...)."
        )
    if model.cond is None and jnp.issubdtype(cond.dtype, jnp.floating):
        null = np.zeros((), cond.dtype)  # labels as vectors: no class is the zero vector
    return jax.tree.map(lambda a, one: jnp.broadcast_to(jnp.asarray(one, a.dtype), a.shape), cond, null)


def drop(model: Conditional, cond: Cond | None, rate: float, key: Key) -> Cond | None:
    """The conditions of a batch, of which each sample's became the null condition with probability `rate`."""
    if not rate or cond is None:
        return cond
    dropped = jax.random.uniform(key, (len(jax.tree.leaves(cond)[0]),)) < rate
    return jax.tree.map(lambda a, null: jnp.where(_like(dropped, a), null, a), cond, null_like(model, cond))


def with_scales(model: Conditional, cond: Cond | None, key: Key) -> Cond | None:
    """The conditions of a batch, for a guided student with scales that are drawn uniformly, for others as they are."""
    if model.guided is None:
        return cond
    low, high = model.guided
    count = len(jax.tree.leaves(cond)[0])
    return guided.told(jax.random.uniform(key, (count,), minval=low, maxval=high), cond)


def checked_scales(scales: Any) -> tuple[float, float] | None:
    """A range of scales as two numbers; None stays None.

    Raises:
      ValueError: it is no pair of finite numbers, or the first is above the second.
    """
    if scales is None:
        return None
    pair = tuple(scales) if np.ndim(scales) == 1 else ()
    numbers = all(isinstance(s, Real) and not isinstance(s, bool) and isfinite(s) for s in pair)
    if len(pair) != 2 or not numbers or pair[0] > pair[1]:
        raise ValueError(
            f"The scales of a guided student must be (least, largest), such as (1.0, 4.0), got {scales!r}."
        )
    return float(pair[0]), float(pair[1])


def shown(structs: Cond) -> str:
    """Shapes and types in words."""
    return ", ".join(f"{name} {leaf.dtype}{list(leaf.shape)}".strip() for name, leaf in _named(structs).items())


def _like(per_sample: Array, a: Array) -> Array:
    return per_sample.reshape(len(per_sample), *(1,) * (a.ndim - 1))


def _compare(what: str, found: Any, wanted: Any, advice: str) -> None:
    """Raises ValueError unless two trees have the same names, shapes and kinds of numbers."""
    said = f"{what} must be {shown(wanted)}: {advice}"
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        raise ValueError(f"{said}. Got {shown(described(found).tree)}.")  # type: ignore[union-attr]
    for (name, given), like in zip(_named(found).items(), jax.tree.leaves(wanted), strict=True):
        kind = given.dtype if hasattr(given, "dtype") else np.result_type(given)
        real = jnp.issubdtype(like.dtype, jnp.floating)
        same = next(k for k in KINDS if jnp.issubdtype(like.dtype, k))
        if np.shape(given) != like.shape or not any(jnp.issubdtype(kind, k) for k in (same, *[jnp.integer] * real)):
            place = f" for {name}" if name else ""
            raise ValueError(f"{said}. Got shape {list(np.shape(given))}, type {kind}{place}.")


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of their places; a tree of one leaf has the name ""."""
    return {".".join(names(path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
