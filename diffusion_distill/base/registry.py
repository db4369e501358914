"""Dataclasses from plain mappings, with errors that name the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from diffusion_distill.base.errors import choose

T = TypeVar("T")


def from_mapping(kind: type[T], what: str, values: Mapping[str, Any]) -> T:
    """Builds the dataclass `kind` from values by field name; lists become tuples.

    Args:
      what: its name in error messages, for example "method 'tract'".

    Raises:
      ValueError: a value has no field (near matches are named), or the dataclass refuses it.
      TypeError: a value's type differs from that of the field's default.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in ("parent", "name")}  # type: ignore[arg-type]
    settings = {}
    for name, value in values.items():
        field = choose(f"field of {what}:", name, fields)
        value = tuple(value) if isinstance(value, list) else value
        if field.default is not dataclasses.MISSING and field.default is not None and value is not None:
            value = _cast(f"{what}, field {name!r}", value, field)
        settings[name] = value
    try:
        return kind(**settings)
    except TypeError as error:
        raise TypeError(f"{what}: {error}. Fields: {', '.join(fields)}.") from error


def check_keys(kind: str, description: Any, needed: Sequence[str]) -> None:
    """Looks whether the description of a `kind` has all the keys that it needs and no others.

    Raises:
      TypeError: it is no mapping.
      ValueError: an unknown key (near matches are named) or a missing one.
    """
    if not isinstance(description, Mapping):
        raise TypeError(f"The description of a {kind} must be a mapping with {', '.join(needed)}, got {description!r}.")
    for name in description:
        choose(f"field of a {kind}:", name, dict.fromkeys(needed))
    missing = [name for name in needed if name not in description]
    if missing:
        raise ValueError(f"The description of a {kind} lacks {', '.join(missing)}. It needs {', '.join(needed)}.")


def to_mapping(value: Any) -> dict[str, Any]:
    """The fields of a dataclass or Flax module, one level deep."""
    names = (f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name"))
    return {name: getattr(value, name) for name in names}


def defaults_of(value: Any) -> dict[str, Any]:
    """The default of each field of a dataclass or Flax module, or of an object's class, that has one."""
    found = {}
    for field in dataclasses.fields(value):
        if field.name in ("parent", "name"):
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def describe(value: Any, registry: Mapping[str, type]) -> dict[str, Any]:
    """A dataclass or Flax module of a registry as {"name": ..., its fields}, from which `rebuild` makes it again.

    Raises:
      ValueError: the registry does not know its class.
    """
    kind = type(value)
    for name, entry in registry.items():
        if entry is kind:
            return {"name": name, **to_mapping(value)}
    raise ValueError(
        f"{kind.__name__} cannot be written down: no registry knows it. Register it first, for example "
        f"diffusion_distill.NETWORKS[{kind.__name__.lower()!r}] = {kind.__name__}; known: {', '.join(registry)}."
    )


def rebuild(kind: str, description: Mapping[str, Any], registry: Mapping[str, Any]) -> Any:
    """Rebuilds an object from the dictionary that `describe` made; error messages call it `kind`.

    Raises:
      ValueError: the name is missing or unknown, or `from_mapping` refuses a field.
    """
    if not isinstance(description, Mapping) or "name" not in description:
        known = ", ".join(registry)
        raise ValueError(f"The description of a {kind} lacks its name: {description!r}. Known: {known}.")
    name = description["name"]
    values = {k: v for k, v in description.items() if k != "name"}
    return from_mapping(choose(kind, name, registry), f"{kind} {name!r}", values)


def _cast(where: str, value: Any, field: dataclasses.Field) -> Any:
    """The value in the type of the field's default: whole numbers serve as float, and lengths are text or numbers."""
    default, number = field.default, isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, float) and number:
        return float(value)
    length = "str | int" in str(field.type) and (number or isinstance(value, str))
    if type(value) is not type(default) and not length and not dataclasses.is_dataclass(default):
        raise TypeError(f"{where} must be {type(default).__name__} like {default!r}, got {value!r}.")
    return value
