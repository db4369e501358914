"""Folders for other programs: diffusers' own layout, and state dicts in ADM's names.

    diffusers    model_index.json, unet/, scheduler/           `DiffusionPipeline.from_pretrained(FOLDER)`
    pytorch      model.safetensors, arguments.json             `UNetModel(**arguments)`, `load_state_dict`

Each has a README.md, the model card. Before a folder is in its place its weights are read again as an import would read
them, and the network with them is called once beside the exported one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.files import user_path
from diffusion_distill.base.typing import Params
from diffusion_distill.base.whole import whole, write_json
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import safetensors_file
from diffusion_distill.process.time_input import TimeOfProcess
from diffusion_distill.weights import adm, card, diffusers, same_network, schedulers, state_dict, torch_models
from diffusion_distill.weights.families import FAMILIES, Family
from diffusion_distill.weights.matching import Checkpoint, WeightsError, flatten, unflatten

CARD, ARGUMENTS, TENSORS = "README.md", "arguments.json", "model.safetensors"
PIPELINES = {"DDIMScheduler": "DDIMPipeline", "CMStochasticIterativeScheduler": "ConsistencyModelPipeline"}
#: The version of diffusers whose formats are written.
DIFFUSERS = "0.30.0"


class Export(NamedTuple):
    """What was written.

    Attributes:
      place: the file or folder.
      difference: the largest one between the exported network's outputs and those of the network that was read back; of
        files of this library, between parameters.
      note: what else is to be known of it.
    """

    place: Path
    difference: float
    note: str = ""


def write(folder: str | Path, found: Checkpoint, form: str) -> Export:
    """Writes a folder, whole or not at all.

    Args:
      folder: its place; what stands there must be an export.
      found: what is exported.
      form: a name in `FORMS`.

    Raises:
      WeightsError: the other program cannot compute what the model does.
      ValueError: something else stands in the folder's place.
      ImportError: safetensors is not installed.
    """
    place = user_path(folder)
    if place.exists() and not (place.is_dir() and ((place / CARD).is_file() or not os.listdir(place))):
        raise ValueError(f"{place} is there and is no export. Choose another place, so that nothing is lost.")
    with whole(place) as half:
        family, arguments, text = FORMS[form](half, found)
        difference = _read_back(half, FAMILIES[family], arguments, found)
        (half / CARD).write_text(text, encoding="utf-8")
    return Export(place, difference)


def _to_diffusers(half: Path, found: Checkpoint) -> tuple[str, dict[str, Any], str]:
    """Writes everything but the card; returns the family, its arguments, and the card."""
    model, params = without_variance(found.model, found.params)
    arguments = diffusers.arguments_of(model.network, model.shape)
    scheduler = schedulers.config_of(model, found.grid if found.steps else None)
    pipeline, version = PIPELINES[scheduler["_class_name"]], {"_diffusers_version": DIFFUSERS}
    tensors = FAMILIES["diffusers_unet2d"].to_tensors(arguments, params)
    _write_tensors(half / "unet" / f"{state_dict.STEM}.safetensors", tensors)
    parts = {"unet": ["diffusers", diffusers.NAME], "scheduler": ["diffusers", scheduler["_class_name"]]}
    write_json(half / "model_index.json", {"_class_name": pipeline, **version, **parts})
    write_json(half / "unet" / "config.json", {"_class_name": diffusers.NAME, **version, **arguments})
    write_json(half / "scheduler" / torch_models.SCHEDULER, {**scheduler, **version})
    return "diffusers_unet2d", arguments, card.of_diffusers(found, pipeline)


def _to_pytorch(half: Path, found: Checkpoint) -> tuple[str, dict[str, Any], str]:
    """Writes everything but the card; returns the family, its arguments, and the card."""
    arguments = adm.arguments_of(found.model.network, found.model.shape)
    _write_tensors(half / TENSORS, FAMILIES["guided_diffusion"].to_tensors(arguments, found.params))
    schedule = schedule_of(found.model, arguments)
    write_json(half / ARGUMENTS, {"network": arguments, "schedule": schedule})
    return "guided_diffusion", arguments, card.of_pytorch(found, schedule)


#: form -> what writes it: (folder, what is exported) -> (family, its arguments, card).
FORMS: dict[str, Callable[[Path, Checkpoint], tuple[str, dict[str, Any], str]]] = {
    "diffusers": _to_diffusers,
    "pytorch": _to_pytorch,
}


def without_variance(model: Model, params: Params) -> tuple[Model, dict[str, Any]]:
    """A model that predicts the noise alone; of one that predicts a variance beside it, the noise's half.

    Deterministic samplers do not use the variance, and the noise is the same.

    Raises:
      WeightsError: the network that predicts a variance is no U-Net.
    """
    if model.prediction != "eps_var":
        return model, dict(params)
    channels = model.shape[-1]
    network, flat = same_network.unet_of(model.network, diffusers.NAME).clone(out_ch=channels), flatten(params)
    flat |= {name: flat[name][..., :channels] for name in ("conv_out/kernel", "conv_out/bias")}
    return replace(model, network=network, prediction="eps"), unflatten(flat)


def schedule_of(model: Model, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `torch_models` reads the model's levels from, beside the network's arguments; None if nothing says them."""
    process, told = model.process, model.time_input
    if not (hasattr(process, "beta_end") and isinstance(told, TimeOfProcess)):
        return None
    fields = asdict(process)  # type: ignore[call-overload]
    schedule = {
        "beta_schedule": fields.get("kind", "linear"),
        "beta_start": fields["beta_start"],
        "beta_end": fields["beta_end"],
        "num_diffusion_timesteps": fields["steps"],
        "zero_snr": fields.get("zero_snr", False),
        "rescale_timesteps": told.factor == 1000,
        "prediction": None if model.prediction == "eps_var" else model.prediction,
    }
    try:
        again, *_ = torch_models.model_of(torch_models.Described("guided_diffusion", arguments, schedule))
    except WeightsError:
        return None
    same = (again.process, again.time_input, again.prediction) == (process, told, model.prediction)
    return schedule if same else None


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(path, tensors, {"format": "pt"})


def _read_back(half: Path, family: Family, arguments: Mapping[str, Any], found: Checkpoint) -> float:
    """The largest difference between outputs of the exported network and of the one that is read from the folder.

    Raises:
      WeightsError: parameters that were read are not those that were written.
    """
    file, (model, params) = half / TENSORS, (found.model, found.params)
    stored = state_dict.read(file if file.is_file() else half)
    arguments = stored.config or arguments
    network, _ = family.network(arguments)
    read = family.to_params(arguments, stored.tensors, str(half))
    if network.out_ch != model.network.out_ch:
        model, params = without_variance(model, params)
    wanted, there = flatten(params), flatten(read)
    changed = [name for name in wanted if not np.array_equal(np.asarray(wanted[name], np.float32), there[name])]
    if changed:
        raise WeightsError(f"{', '.join(changed[:3])} changed on the way to {half} and back.")
    inputs = jax.random.normal(jax.random.key(0), (1, *model.shape)), jnp.full(1, 100.0), conditions.zeros(model)
    exported = found.model.adapter.apply(found.params, *inputs)[..., : network.out_ch]
    return float(jnp.abs(exported - replace(model, network=network).adapter.apply(read, *inputs)).max())
