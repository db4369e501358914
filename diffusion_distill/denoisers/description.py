"""A model as plain values for JSON, and back.

A network of the library's registry is described by its name and settings. Another one is described as well as can be,
by its kind, its class and those of its settings that are plain; to load it, it must be given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.base.registry import check_keys, describe, rebuild, to_mapping
from diffusion_distill.denoisers.adapters import Linen
from diffusion_distill.denoisers.given import Given
from diffusion_distill.networks import NETWORKS
from diffusion_distill.process.processes import PROCESSES
from diffusion_distill.process.time_input import TIME_INPUTS

#: Fields that a description may lack, because an older version wrote it: they have their defaults.
OPTIONAL = ("cond", "null", "data_range", "guided")


def to_dict(model: Any) -> dict[str, Any]:
    """The description of a `Model`.

    Raises:
      ValueError: a process or time input that no registry knows.
    """
    if isinstance(model.network, Given):
        raise ValueError(
            "A denoiser that was given as a function cannot be saved. To keep it, make a model of its network: "
            "Model(network, ...)."
        )
    return {
        "network": _network(model),
        "process": describe(model.process, PROCESSES),
        "prediction": model.prediction,
        "time_input": describe(model.time_input, TIME_INPUTS),
        "shape": list(model.shape),
        "cond": None if model.cond is None else _written(model.cond.tree),
        "null": None if model.null is None else _written(model.null.tree),
        "data_range": None if model.data_range is None else list(model.data_range),
        **({} if model.guided is None else {"guided": list(model.guided)}),
    }


def from_dict(described: Mapping[str, Any], network: Any = None) -> dict[str, Any]:
    """The fields of the model that was described.

    Args:
      network: the network, where the library cannot rebuild it, or another one in its place.

    Raises:
      ValueError, TypeError: as `Model.from_dict`.
    """
    needed = ("network", "process", "prediction", "time_input", "shape")
    if isinstance(described, Mapping):
        for name in described:
            choose("field of a model:", name, dict.fromkeys((*needed, *OPTIONAL)))
        check_keys("model", {k: v for k, v in described.items() if k not in OPTIONAL}, needed)
    else:
        check_keys("model", described, needed)
    fields = {
        "network": _built(described["network"]) if network is None else network,
        "process": rebuild("process", described["process"], PROCESSES),
        "prediction": described["prediction"],
        "time_input": rebuild("time_input", described["time_input"], TIME_INPUTS),
        "shape": tuple(described["shape"]),
    }
    for name in ("cond", "null"):
        if described.get(name) is not None:
            fields[name] = _condition(name, described[name])
    for name in ("data_range", "guided"):
        if name in described:
            fields[name] = described[name]
    return fields


def can_build(network: Any) -> bool:
    """Whether the library can build a model's network again from its description: it is one of `NETWORKS`."""
    return type(network) in NETWORKS.values()


def _network(model: Any) -> dict[str, Any]:
    adapted = model.adapter
    if can_build(model.network):
        return describe(model.network, NETWORKS)
    found = {"kind": adapted.kind, "class": adapted.name}
    if isinstance(adapted, Linen):
        found["settings"] = {name: value for name, value in to_mapping(adapted.module).items() if _is_plain(value)}
    return found


def _built(described: Mapping[str, Any]) -> Any:
    if isinstance(described, Mapping) and "kind" in described and "name" not in described:
        raise ValueError(
            f"The network is a {described['kind']}, {described.get('class')!r}, which the library cannot build. Build "
            "it as it was, and give it: Artefact.load(folder, network=...). A Flax Linen module can be made known "
            "instead, by diffusion_distill.NETWORKS['my_network'] = MyNetwork, before the model is saved."
        )
    return rebuild("network", described, NETWORKS)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _written(tree: Any) -> Any:
    """A tree of dictionaries, lists and tuples as JSON can say it; leaves are shapes and types, perhaps with values."""
    if isinstance(tree, Mapping):
        return {"tree": {name: _written(part) for name, part in tree.items()}}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return {"tuple" if isinstance(tree, tuple) else "list": [_written(part) for part in tree]}
    if isinstance(tree, np.ndarray | np.generic | jax.ShapeDtypeStruct):
        leaf = {"shape": list(tree.shape), "dtype": str(tree.dtype)}
        return leaf | ({} if isinstance(tree, jax.ShapeDtypeStruct) else {"values": np.ravel(tree).tolist()})
    raise ValueError(f"A condition must be made of dictionaries, lists, tuples and arrays to be saved, got {tree!r}.")


def _condition(name: str, written: Any) -> Any:
    """What `_written` wrote; ValueError for anything else, since descriptions are files that people edit."""
    try:
        return _read(written)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, SyntaxError, RecursionError) as error:
        raise ValueError(
            f"The field {name!r} of a model must be a tree of arrays as Model.to_dict() writes it, such as "
            f'{{"shape": [], "dtype": "int32"}}, got {str(written)[:200]}.'
        ) from error


def _read(written: Mapping[str, Any]) -> Any:
    if "tree" in written:
        return {name: _read(part) for name, part in written["tree"].items()}
    if "tuple" in written or "list" in written:
        parts = [_read(part) for part in written.get("tuple", written.get("list"))]
        return tuple(parts) if "tuple" in written else parts
    shape, kind = tuple(written["shape"]), np.dtype(str(written["dtype"]))
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"a shape of {shape}")
    if "values" in written:
        return np.array(written["values"], kind).reshape(shape)
    return jax.ShapeDtypeStruct(shape, kind)
