"""JSON from files that are not trusted: one object, of limited size, in which no name stands twice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import EDITED


def loads(content: bytes | memoryview, most: int) -> dict[str, Any]:
    """The JSON object that these bytes are, as UTF-8.

    Args:
      most: how many bytes are read at most. What they become can take some forty times their space.

    Raises:
      WeightsError: there are more bytes, or they are something else; a name stands twice; or a number is not finite,
        which is no JSON.
    """
    if len(content) > most:
        raise WeightsError(f"there are {len(content)} bytes of JSON; at most {most} are read")
    try:
        text = str(content, EDITED)
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the JSON is damaged: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"the JSON is a {type(found).__name__}, not an object")
    return found


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise WeightsError(f"the name {twice[:40]!r} stands twice")
    return found


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise WeightsError(f"the number {text[:40]} is not finite")
    return number
