"""Weights for other programs: safetensors, with the description of the model in the metadata.

Arrays are named by their paths (`down_0.block_1/conv1/kernel`). The metadata has one key, "diffusion_distill", whose
value is JSON with everything needed to build the model, and the origin of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_distill.base.files import plain, user_path
from diffusion_distill.base.typing import Params
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import safetensors_file
from diffusion_distill.process import grids
from diffusion_distill.weights import old_words
from diffusion_distill.weights.matching import (
    Checkpoint,
    WeightsError,
    check_places,
    flatten,
    match,
    shapes_of,
    unflatten,
)

KEY = "diffusion_distill"
#: The largest whole number in a plausible description: a width, a step count. Building a network takes time and memory.
LARGEST = 2**16


def save(path: str | Path, params: Params, description: Mapping[str, Any]) -> Path:
    """Writes parameters and a JSON-ready description; an interrupted write leaves no file.

    Raises:
      ImportError: safetensors is not installed.
      TypeError, ValueError: the description is not JSON-ready.
      WeightsError: a parameter's name is empty or contains "/", or safetensors does not know its type.
    """
    path = user_path(path)
    metadata = {KEY: json.dumps(description, allow_nan=False, default=plain)}
    safetensors_file.write(path, flatten(params), metadata)
    return path


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save` wrote: (nested dictionaries of NumPy arrays, description).

    The arrays are read-only views of the file, which must not be changed while they are in use.

    Raises:
      WeightsError: the file is damaged, no safetensors file, or was not written by `save`.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    arrays, metadata = safetensors_file.read_with_metadata(path)
    return unflatten(arrays), _description(path, metadata)


def is_ours(path: str | Path) -> bool:
    """Whether a safetensors file has a description that `save` writes.

    Raises:
      WeightsError, OSError: as `load`.
    """
    return KEY in safetensors_file.read_with_metadata(user_path(path))[1]


def read(path: str | Path, model: Model | None = None) -> Checkpoint:
    """An exported model, checked like the weights of any other program.

    Args:
      model: what the file must hold; by default what it says.

    Raises:
      WeightsError: as `load`; a description that lacks something or describes no plausible model; another model than
        `model`; arrays that do not fit it, see `matching.match`.
      OSError: it cannot be opened.
    """
    tree, about = load(path)
    stored, about = flatten(tree), old_words.translated(about)
    described = _model(path, _entry(path, about, "model", dict), len(stored))
    if model is not None and model != described:
        raise WeightsError(f"{path} holds another model than the one asked for: {described}.")
    steps, provenance = _entry(path, about, "steps", int), _entry(path, about, "provenance", dict)
    if not 0 <= steps <= LARGEST:
        raise WeightsError(f"{path}: steps must be in [0, {LARGEST}], 0 for a teacher, got {steps}.")
    try:
        grid, shapes = grids.from_numbers(about.get("grid")), shapes_of(described)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    params = match(stored, shapes, str(path))
    return Checkpoint(described, unflatten(params), steps, facts=provenance, grid=grid)


def _entry(path: str | Path, about: Mapping[str, Any], name: str, kind: type) -> Any:
    """An entry of the description, of the type it must have."""
    if type(about.get(name)) is not kind:
        found = f"{name} {about[name]!r:.80}" if name in about else f"no {name}"
        raise WeightsError(
            f"{path}: the description under {KEY!r} has {found}; needed are model, steps and provenance, as "
            "--mode=export writes them."
        )
    return about[name]


def _model(path: str | Path, described: Mapping[str, Any], arrays: int) -> Model:
    """The model of a description whose numbers are plausible for a file of so many arrays."""
    if (large := max((abs(n) for n in _whole_numbers(described)), default=0)) > LARGEST:
        raise WeightsError(f"{path}: the described model has a setting of {large}; at most {LARGEST} is plausible.")
    try:
        found = Model.from_dict(described)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: its description is of no model that can be built: {error}") from error
    check_places(found.network, found.shape)
    network = found.network  # every block has arrays of its own; building many of them takes time
    blocks = len(getattr(network, "ch_mult", ())) * (1 + getattr(network, "num_res_blocks", 0))
    if (blocks := blocks + getattr(network, "depth", 0)) > arrays:
        raise WeightsError(f"{path}: a network of at least {blocks} blocks is described, but it has {arrays} arrays.")
    return found


def _whole_numbers(value: Any) -> Iterator[int]:
    """All whole numbers in nested lists and mappings."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _whole_numbers(part)


def _description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        description = json.loads(metadata[KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} was not written by this library: its metadata has no JSON under {KEY!r}, but "
            f"{', '.join(metadata) or 'nothing'}."
        ) from error
    if not isinstance(description, dict):
        raise WeightsError(f"{path}: the description under {KEY!r} is no JSON object.")
    return description
