"""Weights for other programs: safetensors, with the description of the model in the metadata.

Arrays are called by their paths (`down_0.block_1/conv1/kernel`). The metadata has one key, "diffusion_distill",
whose value is JSON: all it takes to build the model, and where the weights come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_distill.files import stand_in_of, user_path
from diffusion_distill.typing import Params
from diffusion_distill.weights.matching import WeightsError, flatten, unflatten

KEY = "diffusion_distill"


def save(path: str | Path, params: Params, description: Mapping[str, Any]) -> Path:
    """Writes parameters and a JSON-ready description; the file appears whole or not at all.

    Raises:
      ImportError: safetensors is not installed.
      TypeError, ValueError: the description is not JSON-ready.
      WeightsError: a parameter's name is empty or contains "/", or safetensors does not know its type.
    """
    _need_safetensors()
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = user_path(path)
    metadata = {KEY: json.dumps(description, allow_nan=False)}
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in flatten(params).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        save_file(arrays, unfinished, metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save` wrote: (nested dictionaries of NumPy arrays, description).

    Raises:
      ImportError: safetensors is not installed.
      WeightsError: the file is damaged, no safetensors file, or was not written by `save`.
      OSError: it cannot be opened.
    """
    _need_safetensors()
    from safetensors import SafetensorError, safe_open

    path = user_path(path)
    with open(path, "rb"):
        pass  # a file that cannot be opened is no damaged file
    try:
        with safe_open(path, framework="np") as stored:
            metadata = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is damaged or no safetensors file: {stand_in_of(path) or error}.") from error
    return unflatten(arrays), _description(path, metadata)


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


def _need_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError("This needs safetensors: pip install 'diffusion_distill[export]'.") from error
