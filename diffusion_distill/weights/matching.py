"""Stored arrays against a model's parameters: every array is used once, every parameter filled once.

Shared by all importers. A tree of parameters is nested dictionaries; flat, it is {path: array} with the names
joined by "/" (they contain dots: `down_0.block_1/conv1/kernel`). Shapes must be equal. An importer may pass
rules for documented differences of layout; whatever else differs is refused, even at equal size, because a
transposed kernel loads silently and gives wrong images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.errors import WeightsError, near_matches
from diffusion_distill.base.typing import Params
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process.levels import Level

Shape = tuple[int, ...]
#: (path, stored shape, wanted shape) -> may the stored array be reshaped, in row-major order, to the wanted shape?
Rule = Callable[[str, Shape, Shape], bool]

SEPARATOR = "/"
#: What parameters may be stored as; they are used as float32.
FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, jnp.bfloat16, np.float64))
#: How many names of a kind an error lists.
LISTED = 8
#: The most numbers in the sinusoids of a transformer's places: half a GiB in float64, and 56 times those of DiT-XL/2
#: for images of 512 by 512.
MOST_PLACES = 2**26


class Checkpoint(NamedTuple):
    """The contents of a file of weights.

    Attributes:
      model: everything but the parameters.
      params: nested dictionaries of float32 NumPy arrays with the names and shapes of the model.
      steps: the sampling steps a student was made for; 0 for a teacher.
      step: updates made; 0 if the file does not say.
      facts: what else the file says about itself, JSON-ready.
      grid: a student's levels, if the file says them.
    """

    model: Model
    params: Params
    steps: int = 0
    step: int = 0
    facts: Mapping[str, Any] = MappingProxyType({})
    grid: Level | None = None


def match(
    stored: Mapping[str, Any], shapes: Mapping[str, Shape], what: str, rules: Sequence[Rule] = ()
) -> dict[str, np.ndarray]:
    """Gives each parameter its array.

    Args:
      stored: {path: NumPy array}.
      shapes: {path: wanted shape}, see `shapes_of`.
      what: the name of the stored arrays in error messages, for example "cifar_1, ema_params".
      rules: differences of layout that are tolerated.

    Returns:
      {path: float32 array of the wanted shape}, in the order of `shapes`; float32 arrays are not copied.

    Raises:
      WeightsError: arrays missing, left over, of another shape, of another type than `FLOATS` or with values
        that are not finite; one error names all of a kind, with both sides.
    """
    missing = [path for path in shapes if path not in stored]
    unknown = [path for path in stored if path not in shapes]
    both = [path for path in shapes if path in stored]
    floats = [path for path in both if _is_floats(stored[path])]
    differing = [path for path in floats if not _fits(path, np.shape(stored[path]), shapes[path], rules)]
    complaints = [
        *_listed(
            "of another type than float32, float16, bfloat16, float64",
            set(both) - set(floats),
            lambda p: f"{p} ({_kind(stored[p])})",
        ),
        *_listed("of another shape", differing, lambda p: _difference(p, np.shape(stored[p]), shapes[p])),
        *_listed("missing", missing, lambda p: p + near_matches(p, unknown)),
        *_listed("unknown to the model", unknown, lambda p: p + near_matches(p, missing)),
    ]
    if complaints:
        raise WeightsError(f"{what}: the arrays do not fit the model.\n  " + "\n  ".join(complaints))
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused below
        filled = {path: np.asarray(stored[path], np.float32).reshape(shape) for path, shape in shapes.items()}
    spoilt = [path for path, array in filled.items() if not np.isfinite(array).all()]
    for complaint in _listed("with values that are not finite", spoilt):
        raise WeightsError(f"{what}: {complaint}")
    return filled


def shapes_of(model: Model) -> dict[str, Shape]:
    """{path: shape} of a model's parameters; none is allocated. Errors as `Model.param_shapes`."""
    return {path: leaf.shape for path, leaf in flatten(model.param_shapes()).items()}


def check_places(network: Any, shape: Shape) -> None:
    """Refuses a transformer that claims more patches than are plausible: building it computes their sinusoids.

    Raises:
      WeightsError: they would be more than `MOST_PLACES` numbers.
    """
    patch = getattr(network, "patch", 0)
    if patch and math.prod(shape[:2]) // patch**2 * network.width > MOST_PLACES:
        raise WeightsError(
            f"Images of {shape[0]} by {shape[1]} in patches of {patch} by {patch}, and {network.width} channels, need "
            f"sinusoids of more than {MOST_PLACES} numbers; that is not plausible."
        )


def digest(shapes: Mapping[str, Shape]) -> str:
    """One number for a parameter tree: sha256 of the lines `<path> <d0>x<d1>...`, sorted, joined by newlines."""
    lines = (f"{path} {'x'.join(map(str, shapes[path]))}" for path in sorted(shapes))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{path: leaf} of nested dictionaries.

    Raises:
      WeightsError: a name is empty, no text, or contains the separator.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(name, str) or not name or SEPARATOR in name:
            raise WeightsError(f"A parameter is called {name!r} (below {above!r}); names are text without '/'.")
        if isinstance(value, Mapping):
            flat |= flatten(value, above + name + SEPARATOR)
        else:
            flat[above + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    Raises:
      WeightsError: a path is at once an array and a folder, or has an empty name.
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split(SEPARATOR)
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or name in inner or "" in (*folders, name):
            raise WeightsError(f"The path {path!r} does not go with the others: it is an array and a folder, or empty.")
        inner[name] = value
    return tree


# ---------------------------------------------------------------- parts


def _fits(path: str, stored: Shape, wanted: Shape, rules: Sequence[Rule]) -> bool:
    same_size = math.prod(stored) == math.prod(wanted)
    return stored == wanted or (same_size and any(rule(path, stored, wanted) for rule in rules))


def _difference(path: str, stored: Shape, wanted: Shape) -> str:
    transposed = " (transposed?)" if sorted(stored) == sorted(wanted) else ""
    return f"{path} is {stored}, the model has {wanted}{transposed}"


def _is_floats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in FLOATS


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__


def _listed(what: str, paths: Iterable[str], describe: Callable[[str], str] = str) -> list[str]:
    """An empty list, or one sentence with the number of names and the first of them."""
    found = sorted(paths)
    more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return [f"{what} ({len(found)}): {'; '.join(map(describe, found[:LISTED]))}{more}."] if found else []
