"""Options of a solver: the parameters of its function behind the grid, asked for by name and checked by their types.

An option means the same however it is given: written behind the solver's name, 'deis order=2 quadrature=left', where
values are JSON or else text, or by keyword. One that the solver does not have, one of another type than its parameter's
annotation (of the default's without one), and one that is given twice are refused.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin

import numpy as np

from diffusion_distill.base.errors import near_matches

#: What JSON calls these.
SPELLINGS = {"True": "true", "False": "false", "None": "null"}


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """The parts of 'deis order=2': ('deis', {'order': 2}).

    Raises:
      ValueError: a part that is not option=value, or an option that is written twice.
    """
    solver, *parts = name.split() or [""]
    options: dict[str, Any] = {}
    for part in parts:
        key, found, value = part.partition("=")
        if not (key and found):
            raise ValueError(
                f"Options of a solver are written option=value, got {part!r} in {name!r}. Leave out blanks in them."
            )
        if key in options:
            raise ValueError(f"The option {key!r} is written twice in {name!r}. Leave one out.")
        try:
            options[key] = json.loads(SPELLINGS.get(value, value))
        except json.JSONDecodeError:
            options[key] = value
    return solver, options


def known(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a solver's function: all its parameters except the grid and what a `partial` has fixed."""
    try:
        signature = inspect.signature(make, eval_str=True)
    except NameError:  # annotations of names that exist for type checkers only
        signature = inspect.signature(make)
    fixed = getattr(make, "keywords", {})
    return {name: found for name, found in list(signature.parameters.items())[1:] if name not in fixed}


def check(solver: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    """Refuses options that a solver does not have, and values of the wrong type.

    Raises:
      TypeError: the message names the option, what came, and what is allowed.
    """
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name, value in options.items():
        if name in known:
            kind = _kind(known[name])
            if not fits(value, kind):
                raise TypeError(
                    f"The option {name!r} of the solver {solver!r} must be {in_words(kind)}, got {value!r}."
                )
        elif not anything:
            raise TypeError(
                f"The solver {solver!r} has no option {name!r}.{near_matches(name, known)} Known: {', '.join(known)}."
            )


def _kind(parameter: inspect.Parameter) -> Any:
    """The parameter's annotation; without one the type of its default, and for None anything."""
    if parameter.annotation is not parameter.empty and not isinstance(parameter.annotation, str):
        return parameter.annotation
    return Any if parameter.default in (None, parameter.empty) else type(parameter.default)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has an annotation's type; whole numbers serve as float, true and false as bool only."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin in (tuple, Sequence):
        if not isinstance(value, tuple | list | np.ndarray):
            return False
        inner = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return not inspect.isclass(kind) or kind is Any or isinstance(value, kind)


def in_words(kind: Any) -> str:
    """A type for a message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(in_words, inner))
    if origin in (tuple, Sequence):
        return f"a list [{', '.join(map(in_words, inner))}{', ...' if origin is Sequence else ''}]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(kind) or getattr(kind, "__name__", str(kind))
