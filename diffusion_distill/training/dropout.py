"""Random dropout in training: of activations inside the student's network, and of whole conditions.

activations   the network's own dropout, at the rate of the network when a teacher is trained, at the rate of the
              method when it is distilled. Only the student drops; teachers and averages never do.
conditions    with probability `label_dropout` a sample's condition becomes the null condition, see
              `denoisers.conditions`, which drops them.
"""

from __future__ import annotations

import dataclasses

from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods.phases import check_rate


def with_dropout(model: Model, rate: float) -> Model:
    """The model with another rate of dropout in its network.

    Raises:
      ValueError: a positive rate for a network that cannot change its own, or a rate outside [0, 1).
    """
    check_rate("dropout", rate)
    return dataclasses.replace(model, network=model.adapter.with_dropout(rate))


def same_but_for_dropout(first: Model, second: Model) -> bool:
    """Whether two models take each other's parameters for the same function: rates of dropout aside, they are equal."""
    return _without_rates(first) == _without_rates(second)


def label_dropout_of(model: Model, asked: float | None) -> float:
    """The rate at which conditions are dropped: the one asked for, or else that of the network's `label_dropout`.

    Without a condition there is nothing to drop, and a guided student has no use for the null condition: the own rate
    of such a network is ignored.

    Raises:
      ValueError: a positive rate was asked for a model without a condition or a null condition, or a guided student, or
        the network's rate is outside [0, 1).
    """
    if asked and model.guided:
        raise ValueError(f"label_dropout={asked} was asked for, but the student is guided already. Leave it out.")
    if asked and not model.conditional:
        raise ValueError(
            f"label_dropout={asked} was asked for, but the model is unconditional (num_classes=1). Leave it out."
        )
    rate = model.adapter.option("label_dropout", 0.0) if asked is None else asked
    check_rate("label_dropout", rate)
    if rate and model.conditional and conditions.null_of(model) is None:
        raise ValueError(
            f"label_dropout={rate} was asked for, but the model has no null condition. Give it one: "
            "Model(..., cond=..., null=...)."
        )
    return rate if model.conditional and not model.guided else 0.0


def _without_rates(model: Model) -> Model:
    return dataclasses.replace(model, network=model.adapter.without_rates())
