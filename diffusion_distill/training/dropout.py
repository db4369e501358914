"""Random dropout in training: of activations inside the student's network, and of whole labels.

activations   the network's own dropout, at the rate of the network when a teacher is trained, at the rate of the
              method when it is distilled. Only the student drops; teachers and averages never do.
labels        with probability `rate` an image's label becomes the null label, which stands for no class (Ho & Salimans,
              arXiv:2207.12598). It is dropped in the batch, before any loss: student, teacher and self-teacher see
              the same labels, whatever the network.

The null label is num_classes, whose one-hot row is zero; for labels that are vectors it is the zero vector. It is what
classifier-free guidance calls the network with, see `guidance`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Batch, Key, Labels
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods.phases import check_rate

#: What the key of an update is folded with for its dropped labels; other streams are folded with small numbers.
LABEL_STREAM = 0x4C41424C


def with_dropout(model: Model, rate: float) -> Model:
    """The model with another rate of dropout in its network.

    Raises:
      ValueError: a positive rate for a network without a field `dropout`, or a rate outside [0, 1).
    """
    check_rate("dropout", rate)
    if hasattr(model.network, "dropout"):
        return model.with_network(dropout=rate)
    if rate:
        raise ValueError(
            f"dropout={rate} was asked for, but the network {type(model.network).__name__} has no field 'dropout'. "
            "Leave dropout out, or give the network that field."
        )
    return model


def same_but_for_dropout(first: Model, second: Model) -> bool:
    """Whether two models take each other's parameters for the same function: rates of dropout aside, they are equal."""
    return _without_rates(first) == _without_rates(second)


def label_dropout_of(model: Model, asked: float | None) -> float:
    """The rate at which labels are dropped: the one asked for, or else that of the network's field `label_dropout`.

    Without a class there is nothing to drop: an unconditional network's own rate is ignored.

    Raises:
      ValueError: a positive rate was asked for an unconditional model, or the network's rate is outside [0, 1).
    """
    if asked and model.num_classes <= 1:
        raise ValueError(
            f"label_dropout={asked} was asked for, but the model is unconditional (num_classes=1). Leave it out."
        )
    rate = getattr(model.network, "label_dropout", 0.0) if asked is None else asked
    check_rate("label_dropout", rate)
    return rate if model.num_classes > 1 else 0.0


def drop_labels(batch: Batch, rate: float, num_classes: int, key: Key) -> Batch:
    """The batch with each label replaced by the null label with probability `rate`."""
    if not rate or "cond" not in batch:
        return batch
    labels = batch["cond"]
    dropped = jax.random.uniform(key, (len(labels),)) < rate
    return {**batch, "cond": _where_dropped(dropped, labels, num_classes)}


def _where_dropped(dropped: Array, labels: Labels, num_classes: int) -> Labels:
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jnp.where(dropped, jnp.asarray(num_classes, labels.dtype), labels)
    return jnp.where(dropped[:, None], jnp.zeros((), labels.dtype), labels)


def _without_rates(model: Model) -> Model:
    rates = {name: 0.0 for name in ("dropout", "label_dropout") if hasattr(model.network, name)}
    return model.with_network(**rates) if rates else model
