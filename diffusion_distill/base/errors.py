"""Errors that say what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
#: How many names, and letters of each, are compared in search of near matches.
COMPARED, COMPARED_LETTERS = 1000, 100


class WeightsError(ValueError):
    """A file of weights that is damaged, unknown, or made for another model."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest known names, or nothing.

    At most `COMPARED` names are compared, by their first `COMPARED_LETTERS`: the time grows with both.
    """
    known = {other[:COMPARED_LETTERS]: other for other in islice(known, COMPARED)}
    near = difflib.get_close_matches(str(name)[:COMPARED_LETTERS], known, n=3, cutoff=0.5)
    matches = [known[other] for other in near]
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def choose(kind: str, name: str, registry: Mapping[str, T]) -> T:
    """Looks a name up in a registry.

    Raises:
      ValueError: the name is unknown; the message lists near matches and all known names.
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    known = ", ".join(sorted(registry))
    raise ValueError(f"Unknown {kind} {name!r}.{near_matches(name, registry)} Known: {known}.")


def in_words(error: Exception) -> str:
    """An error's message; those of the operating system without their number, and with what to do about some."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    advice = {
        errno.ENOSPC: " Free some space: what was saved stays, and the same command goes on with it.",
        errno.EDQUOT: " Free some space: what was saved stays, and the same command goes on with it.",
        errno.EACCES: " Change its permissions, or choose another place.",
        errno.EROFS: " Choose another place.",
        errno.ENOTDIR: " A part of the path is a file, not a folder.",
        errno.EISDIR: " It is a folder, where a file is needed.",
    }
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}{': ' if names else ''}{error.strerror}.{advice.get(error.errno or 0, '')}"


def positive_int(what: str, value: object) -> int:
    """Returns value as an int if it is a whole number of at least 1; raises ValueError otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:  # type: ignore[call-overload]
        raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}.")
    return int(value)  # type: ignore[call-overload]
