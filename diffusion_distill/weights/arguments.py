"""Constructor arguments of other programs' networks, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_distill.base.errors import choose
from diffusion_distill.weights.matching import WeightsError

#: The largest values taken: a config's claims cost memory and time before its tensors are compared with them.
LARGEST, MOST_CLASSES, LONGEST = 2**14, 2**20, 64
REQUIRED = object()


class Arguments:
    """Arguments that are read one by one; what has a default may be missing.

    Args:
      given: name -> value.
      defaults: every name that is known -> its default, or `REQUIRED`.
      what: whose they are, in error messages.

    Raises:
      WeightsError: an unknown name, or one that is missing and has no default.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], what: str):
        self.what = what
        try:
            for name in given:
                choose(f"argument of {what}:", name, defaults)
        except ValueError as error:
            raise WeightsError(str(error)) from error
        self.values = {**defaults, **given}
        if missing := [name for name, value in self.values.items() if value is REQUIRED]:
            raise WeightsError(f"{what} needs the arguments {', '.join(missing)}.")

    def refuse(self, name: str, reason: str) -> WeightsError:
        """The error for a value."""
        return WeightsError(f"{self.what}: {name} is {self.values[name]!r:.80}, {reason}.")

    def whole(self, name: str, least: int = 1, most: int = LARGEST) -> int:
        """A whole number."""
        value = self.values[name]
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(name, f"not a whole number from {least} to {most}")
        return value

    def classes(self, name: str) -> int:
        """A number of classes, 1 if there are none."""
        return 1 if self.values[name] is None else self.whole(name, 2, MOST_CLASSES)

    def number(self, name: str) -> float:
        """A positive number."""
        value = self.values[name]
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.refuse(name, "not a positive number")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        if type(self.values[name]) is not bool:
            raise self.refuse(name, "not true or false")
        return self.values[name]

    def numbers(self, name: str, whole: bool = True) -> tuple[Any, ...]:
        """A list of positive numbers."""
        value = self.values[name]
        kinds = (int,) if whole else (int, float)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > LONGEST:
            raise self.refuse(name, "not a short list of numbers")
        if not all(type(each) in kinds and 0 < each <= LARGEST for each in value):
            raise self.refuse(name, f"not a list of positive {'whole ' if whole else ''}numbers")
        return tuple(value)

    def only(self, reason: str, **allowed: Sequence[Any]) -> None:
        """Refuses arguments whose value is not among those that the library computes with."""
        for name, values in allowed.items():
            if not any(self.values[name] == value and type(self.values[name]) is type(value) for value in values):
                raise self.refuse(name, f"{reason}; taken are {', '.join(map(repr, values))}")
