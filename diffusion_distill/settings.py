"""Dataclasses from plain mappings, with errors that name the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from diffusion_distill.errors import choose

T = TypeVar("T")


def from_mapping(kind: type[T], what: str, values: Mapping[str, Any]) -> T:
    """Builds the dataclass `kind` from values by field name; lists become tuples.

    Args:
      what: how errors call it, for example "method 'tract'".

    Raises:
      ValueError: a value has no field (near matches are named), or the dataclass refuses it.
      TypeError: a value's type differs from that of the field's default.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in ("parent", "name")}  # type: ignore[arg-type]
    settings = {}
    for name, value in values.items():
        default = choose(f"field of {what}:", name, fields).default
        value = tuple(value) if isinstance(value, list) else value
        if default is not dataclasses.MISSING and default is not None and value is not None:
            value = _cast(f"{what}, field {name!r}", value, default)
        settings[name] = value
    try:
        return kind(**settings)
    except TypeError as error:
        raise TypeError(f"{what}: {error}. Fields: {', '.join(fields)}.") from error


def to_mapping(value: Any) -> dict[str, Any]:
    """The fields of a dataclass or Flax module, one level deep."""
    names = (f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name"))
    return {name: getattr(value, name) for name in names}


def _cast(where: str, value: Any, default: Any) -> Any:
    """The value in the type of the default: whole numbers serve as float, and str | int lengths pass as they are."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    both_lengths = isinstance(value, (str, int)) and isinstance(default, (str, int))
    lengths = both_lengths and "length" in where and not isinstance(value, bool)
    if type(value) is not type(default) and not lengths and dataclasses.is_dataclass(default) is False:
        raise TypeError(f"{where} must be {type(default).__name__} like {default!r}, got {value!r}.")
    return value
