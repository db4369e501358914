"""Errors that say what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import errno
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from numbers import Real
from typing import Any, TypeVar

T = TypeVar("T")
#: How many names, and letters of each, are compared in search of near matches.
COMPARED, COMPARED_LETTERS = 1000, 100


#: What XLA calls a device without memory for what is asked.
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
MEMORY_ADVICE = (
    "Use smaller batches (a run in a workdir keeps its batch_size), --config.run.parts=N to work through each batch in "
    "N parts, --config.run.remat=True, or on several devices --config.run.params_parallel=N to share the state. What "
    "was saved stays."
)
#: How other programs' errors say what the operating system's ENOSPC and EDQUOT are.
FULL_DISK = ("No space left on device", "Disk quota exceeded")


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
    shown = f"{name!r:.200}"  # of a damaged file it may be long
    raise ValueError(f"Unknown {kind} {shown}.{near_matches(name, registry)} Known: {known}.")


def advise(error: Exception) -> None:
    """Adds what to do to an error that says that memory is not enough, for those who see it in Python."""
    if _of_memory(error):
        error.add_note(MEMORY_ADVICE)


def _of_memory(error: Exception) -> bool:
    """Whether an error says that memory, of a device or of the machine, is not enough."""
    return isinstance(error, MemoryError) or (OUT_OF_MEMORY in str(error) and not _full_disk(error))


def _full_disk(error: Exception) -> str:
    """What an error says of a full disk; "" if nothing."""
    return next((sign for sign in FULL_DISK if sign in str(error)), "")


def in_words(error: Exception) -> str:
    """An error's message; those of the operating system without their number, and with what to do about some."""
    full = _full_disk(error)
    if full and not isinstance(error, OSError):
        return f"{full}: {str(error)[:300]}. Free some space: what was saved stays, and the same command goes on."
    if _of_memory(error):
        said, advised = " ".join(str(error).split())[:300], MEMORY_ADVICE in getattr(error, "__notes__", ())
        return f"There is not enough memory ({said}).{'' if advised else f' {MEMORY_ADVICE}'}"
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


def finite_number(what: str, value: Any, least: float = 0.0) -> Any:
    """Returns value if it is a finite number of at least `least`; raises ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and float(value) >= least):
        raise ValueError(f"{what} must be a finite number of at least {least:g}, got {value!r}.")
    return value


def truth(what: str, value: Any) -> None:
    """Raises ValueError unless value is True or False: the text 'False' would count as true."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{what} must be True or False, got {value!r}.")
