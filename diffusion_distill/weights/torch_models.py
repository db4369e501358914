"""Models in files of PyTorch and safetensors, and in folders of diffusers.

What the tensors do not show is asked for by name, in one mapping with the constructor arguments of the network:

    argument                    what it is                                      default
    image_size                  height and width of the images                  must be given
    num_heads,                  of ADM's networks: the number of heads, or      one of them must be given
    num_head_channels           their width
    beta_schedule               a rule of `vp_discrete.BETAS`                   'linear'
    beta_start, beta_end        ends of a linear schedule                       1e-4, 0.02
    num_diffusion_timesteps     N                                               1000
    zero_snr                    whether the last step has no signal             false
    rescale_timesteps           networks are told 1000 i/N for the index i      true; false: they are told i
    prediction                  what the network predicts                       'eps', with a variance if it has
                                                                                twice the channels

A folder of diffusers says all of it, in config.json and scheduler_config.json. Consistency models (`FAMILIES`) have
EDM's levels and need none of the last seven.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_distill.base.errors import choose
from diffusion_distill.base.files import user_path
from diffusion_distill.denoisers.guidance import NoisyLogProb
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import strict_json
from diffusion_distill.formats.mapped import mapped
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import PREDICTED
from diffusion_distill.process.processes import DiscreteBetas, LinearBetaDiscrete, Process
from diffusion_distill.process.time_input import EDMInput, TimeOfProcess
from diffusion_distill.process.ve import VE
from diffusion_distill.process.vp_discrete import SCHEDULES
from diffusion_distill.weights import diffusers, state_dict
from diffusion_distill.weights.arguments import Arguments
from diffusion_distill.weights.families import FAMILIES, Family
from diffusion_distill.weights.matching import Checkpoint, WeightsError

NONE: Mapping[str, Any] = MappingProxyType({})
#: What a schedule is described by, with DDPM's values.
SCHEDULE: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_diffusion_timesteps": 1000,
    "zero_snr": False,
    "rescale_timesteps": True,
    "prediction": None,
}
SCHEDULER = "scheduler_config.json"
MAX_SCHEDULER = 2**20  # bytes
#: What the network of a training run is told apart by, and a teacher's has not.
TRAINING = ("dropout", "label_dropout", "dtype", "remat", "init_rule")
MOST_STEPS = 2**16


class Described(NamedTuple):
    """What a file holds.

    Attributes:
      family: a name in `FAMILIES`.
      arguments: constructor arguments of its network.
      schedule: see `SCHEDULE`; not for consistency models.
    """

    family: str
    arguments: Mapping[str, Any]
    schedule: Mapping[str, Any] = NONE


def read(
    path: str | Path, model: Model | None = None, *, family: str | None = None, arguments: Mapping[str, Any] = NONE
) -> Checkpoint:
    """Reads a file or a folder; nothing in it is executed.

    Args:
      model: the model that it must hold; its process, precision and dropout are not compared, but taken.
      family: a name in `FAMILIES`; needed where names of tensors do not show it.
      arguments: what else is to be known, see above.

    Raises:
      WeightsError: it is damaged, or of an unknown kind; something must be given, or contradicts the tensors.
      OSError: it cannot be opened.
    """
    stored = state_dict.read(path)
    if stored.config is not None:
        described = _of_folder(user_path(path), stored, arguments)
    else:
        described = _of_tensors(stored.tensors, family, arguments, str(path))
    found, steps, grid = model_of(described)
    params = FAMILIES[described.family].to_params(described.arguments, stored.tensors, str(path))
    if model is not None:
        _check_same(model, found, path)
    facts = {**stored.facts, "family": described.family, "arguments": _plain(described.arguments)}
    return Checkpoint(model or found, params, steps, facts=facts, grid=grid)


def read_classifier(path: str | Path, arguments: Mapping[str, Any]) -> NoisyLogProb:
    """ADM's classifier of noisy images, as `ClassifierGuided` takes it.

    Args:
      arguments: the network's constructor arguments, such as those in `published_torch.CLASSIFIERS`, and its schedule.

    Raises:
      WeightsError: the file is damaged, or not of such a classifier.
      OSError: it cannot be opened.
    """
    family, stored = FAMILIES["guided_diffusion_classifier"], state_dict.read(path)
    arguments, schedule = _apart(arguments)
    process, time_input, _ = _diffusion(schedule)
    params = family.to_params(arguments, stored.tensors, str(path))
    network, _ = family.network(arguments)
    return NoisyLogProb(jax.tree.map(jnp.asarray, params), network, process, time_input)


def is_known(path: str | Path) -> bool:
    """Whether a file can be read and has tensors named as those of one of `FAMILIES`."""
    try:
        tensors = state_dict.read(path).tensors
    except WeightsError:
        return False
    return any(family.mark in tensors for family in FAMILIES.values())


def model_of(described: Described) -> tuple[Model, int, Level | None]:
    """The model, and of a student its steps and grid.

    Raises:
      WeightsError: arguments or schedule are unknown, or not what the library computes with.
    """
    family = choose("family", described.family, FAMILIES)
    network, shape = family.network(described.arguments)
    if family.edm:
        return _edm_model(network, shape, family.edm)
    process, time_input, prediction = _diffusion(described.schedule)
    twice = network.out_ch == 2 * shape[-1]
    if prediction not in (None, "eps") and twice:
        raise WeightsError(f"A network with a variance beside its output predicts 'eps', not {prediction!r}.")
    said = "eps_var" if twice else prediction or "eps"
    bounds = None if family.latent else (-1.0, 1.0)
    return _model(network, shape, process, said, time_input, data_range=bounds), 0, None


def _model(*fields: Any, **named: Any) -> Model:
    """Model(...), whose errors are those of a file."""
    try:
        return Model(*fields, **named)
    except (ValueError, TypeError) as error:
        raise WeightsError(str(error)) from error


# ---------------------------------------------------------------- schedules


def _diffusion(schedule: Mapping[str, Any]) -> tuple[Process, TimeOfProcess, str | None]:
    given = Arguments(schedule, SCHEDULE, "the schedule")
    steps = given.whole("num_diffusion_timesteps", most=MOST_STEPS)
    given.only("which is unknown", prediction=(None, "eps", "x", "v"))
    rule, ends = given.values["beta_schedule"], (given.number("beta_start"), given.number("beta_end"))
    zero_snr = given.flag("zero_snr")
    try:
        plain = rule == "linear" and not zero_snr
        process = LinearBetaDiscrete(steps, *ends) if plain else DiscreteBetas(rule, steps, *ends, zero_snr=zero_snr)
    except ValueError as error:
        raise WeightsError(f"The schedule: {error}") from error
    factor = 1000.0 if given.flag("rescale_timesteps") else float(steps)
    return process, TimeOfProcess(factor, -factor / steps), given.values["prediction"]


def _edm_model(network: Any, shape: tuple[int, ...], prediction: str) -> tuple[Model, int, Level | None]:
    """A consistency model, which is a student of one step, or a teacher of such models."""
    process = VE()
    model = _model(network, shape, process, prediction, EDMInput(factor=1000.0))
    if prediction == "consistency":
        return model, 1, Level((1.0, 1.0), (process.sigma_max, 0.0))
    return model, 0, None


def _apart(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the network, and those of the schedule."""
    schedule = {name: value for name, value in given.items() if name in SCHEDULE}
    return {name: value for name, value in given.items() if name not in SCHEDULE}, schedule


# ---------------------------------------------------------------- what a file holds


def _of_tensors(tensors: Mapping[str, Any], family: str | None, given: Mapping[str, Any], what: str) -> Described:
    """From names and shapes of tensors, and what was given."""
    name = family or _family_of(tensors, what)
    known: Family = choose("family", name, FAMILIES)
    given, schedule = _apart(given)
    missing = [" or ".join(names) for names in known.asked if not set(names) & set(given)]
    if missing:
        raise WeightsError(
            f"{what}: the tensors of {name} do not show {', '.join(missing)}. Give them as arguments, for example "
            f"arguments={{{', '.join(f'{names[0]!r}: ...' for names in known.asked)}}}."
        )
    try:
        shown = known.inferred(tensors, given["image_size"]) if known.inferred else {}
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise WeightsError(f"{what}: the tensors are not those of {name}: {error} is missing or misshaped.") from error
    if wrong := [key for key, value in known.fixed.items() if given.get(key, value) != value]:
        said = ", ".join(f"{key}={known.fixed[key]}" for key in wrong)
        raise WeightsError(f"{what}: all networks of {name} have {said}. Leave it out, or give another family.")
    return Described(name, {**shown, **known.fixed, **given}, schedule)


def _family_of(tensors: Mapping[str, Any], what: str) -> str:
    """The only family whose mark is among the tensors."""
    possible = [name for name, known in FAMILIES.items() if known.mark in tensors]
    if not possible:
        raise WeightsError(
            f"{what}: the tensors, such as {', '.join(list(tensors)[:3])}, are named as those of no program that is "
            f"known. Known are files of {', '.join(FAMILIES)}."
        )
    if len(possible) > 1:
        raise WeightsError(
            f"{what}: the tensors are named as those of several programs. Say which of them with family=: "
            f"{', '.join(possible)}."
        )
    return possible[0]


def _of_folder(folder: Path, stored: state_dict.StateDict, given: Mapping[str, Any]) -> Described:
    """From the descriptions in a folder of diffusers, and what was given."""
    said = dict(stored.config or {})
    kind = said.get("_class_name", diffusers.NAME)
    family = next((name for name, known in FAMILIES.items() if kind in known.classes), None)
    if family is None:
        read = ", ".join(known.classes[0] for known in FAMILIES.values() if known.classes)
        raise WeightsError(
            f"{folder} holds a network of the class {str(kind)[:80]!r}. Of diffusers, {read} are read. A network of "
            "another class can be used if it is written in JAX, see docs/extending.md."
        )
    if kind == diffusers.NAME and "attention_head_dim" not in {**said, **given}:
        raise WeightsError(
            f"{folder}: config.json does not say attention_head_dim. Older files mean one head by that (null), later "
            "programs heads of 8 channels. Give it as an argument, for example arguments={'attention_head_dim': None}."
        )
    places = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER]
    found = next((place for place in places if place.is_file()), None)
    schedule = _of_scheduler(found, given) if found else {}
    steps = said.pop("num_train_timesteps", None)
    if steps is not None:
        schedule.setdefault("num_diffusion_timesteps", steps)
    arguments, told = _apart(given)
    return Described(family, {**said, **arguments}, {**schedule, **told})


def _of_scheduler(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule in a scheduler_config.json; networks of diffusers are told the index."""
    try:
        said = strict_json.loads(mapped(path), MAX_SCHEDULER)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}.") from error
    if "_class_name" in said and "beta_schedule" not in {*said, *given}:
        raise WeightsError(
            f"{path}: the scheduler {str(said['_class_name'])[:80]!r} has no beta_schedule, so its levels are not "
            "those that are read here. If the network was trained with betas, give beta_schedule as an argument."
        )
    if said.get("trained_betas") and "beta_schedule" not in given:
        raise WeightsError(f"{path}: trained_betas are not known here. Give beta_schedule and its ends as arguments.")
    names = {"beta_start": "beta_start", "beta_end": "beta_end", "num_train_timesteps": "num_diffusion_timesteps"}
    found = {ours: said[theirs] for theirs, ours in names.items() if theirs in said}
    if said.get("rescale_betas_zero_snr") is not None:  # null means false
        found["zero_snr"] = said["rescale_betas_zero_snr"]
    words = (("beta_schedule", "beta_schedule", SCHEDULES), ("prediction_type", "prediction", PREDICTED))
    for theirs, ours, known in words:
        if theirs in said:
            if not isinstance(said[theirs], str) or said[theirs] not in known:
                raise WeightsError(f"{path}: {theirs} is {said[theirs]!r:.80}; known are {', '.join(known)}.")
            found[ours] = known[said[theirs]]
    return {**found, "rescale_timesteps": False}


def _check_same(wanted: Model, found: Model, path: str | Path) -> None:
    """Refuses another network, prediction or input than the one asked for."""
    settings = {name: getattr(wanted.network, name) for name in TRAINING if hasattr(wanted.network, name)}
    same_kind = type(wanted.network) is type(found.network)
    found = dataclasses.replace(found, network=found.network.clone(**settings)) if same_kind else found
    names = ("network", "shape", "prediction", "time_input")
    differing = [name for name in names if getattr(wanted, name) != getattr(found, name)]
    if differing:
        said = "; ".join(f"{name} is {getattr(found, name)} instead of {getattr(wanted, name)}" for name in differing)
        raise WeightsError(f"{path} holds another model than the one asked for: {said:.600}.")


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
