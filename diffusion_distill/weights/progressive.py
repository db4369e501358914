"""Google's checkpoints of progressive distillation (Salimans & Ho 2022): flax msgpack files.

    {step, num_sample_steps, ema_params,
     optimizer: nil or {target: parameters, state: {step, param_states: {...: {grad_ema, grad_sq_ema}}}}}

`ema_params` are what is sampled and distilled. num_sample_steps is 0, or absent, for a teacher. Two older layouts
are read as well: group norms of flax before 0.3.6, and attention with its heads flattened into one axis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import flax_file
from diffusion_distill.weights import matching
from diffusion_distill.weights.matching import Checkpoint, Shape, WeightsError

ENTRIES = ("step", "num_sample_steps", "ema_params", "optimizer")
#: What can be read, and where it lies; the two moments of Adam are leaves below each parameter's name.
TREES = {
    "ema_params": ("ema_params",),
    "optimizer_target": ("optimizer", "target"),
    "grad_ema": ("optimizer", "state", "param_states"),
    "grad_sq_ema": ("optimizer", "state", "param_states"),
}
MOMENTS = ("grad_ema", "grad_sq_ema")


def read(path: str | Path, model: Model, which: str = "ema_params") -> Checkpoint:
    """Reads a checkpoint; entries that are not needed are skipped and cost no memory.

    Args:
      which: 'ema_params'; in a file with an optimizer also 'optimizer_target', 'grad_ema' or 'grad_sq_ema'.

    Raises:
      WeightsError: the file is damaged, of another layout, lacks what `which` names, or its arrays do not fit the
        model, see `matching.match`.
      ValueError: unknown `which`.
      OSError: the file cannot be opened.
    """
    place = choose("tree of a checkpoint", which, TREES)
    others = set(MOMENTS) - {which}

    def want(location: flax_file.Location) -> bool:
        if location[0] not in ENTRIES:
            raise WeightsError(f"an entry that this format does not have; known: {', '.join(ENTRIES)}")
        numbers = location[0] in ("step", "num_sample_steps")
        in_place = location[: len(place)] == place[: len(location)]
        return numbers or (in_place and not (which in MOMENTS and location[-1] in others))

    content = flax_file.read(path, want)
    stored = matching.flatten(_tree(path, content, place))
    suffix = f"/{which}" if which in MOMENTS else ""
    shapes = {name + suffix: shape for name, shape in matching.shapes_of(model).items()}
    rules = [_without(suffix, rule) for rule in (old_group_norm, flat_heads)]
    filled = matching.match(stored, shapes, f"{path}, {'/'.join(place)}", rules)
    params = matching.unflatten({name.removesuffix(suffix): array for name, array in filled.items()})
    steps, step = (_whole(path, name, content.get(name, 0)) for name in ("num_sample_steps", "step"))
    return Checkpoint(model, params, steps, step)


def old_group_norm(path: str, stored: Shape, wanted: Shape) -> bool:
    """Scale and bias of a group norm as (1, 1, 1, C) instead of (C,): flax before about 0.3.6."""
    *_, module, name = ("", *path.split("/"))
    return module.startswith("norm") and name in ("scale", "bias") and stored == (1, 1, 1, *wanted)


def flat_heads(path: str, stored: Shape, wanted: Shape) -> bool:
    """q, k, v and proj_out of an attention with (heads, head_dim) as one axis."""
    *_, module, _ = ("", *path.split("/"))
    if len(wanted) < 2:
        return False
    if module in ("q", "k", "v"):
        return stored == (*wanted[:-2], wanted[-2] * wanted[-1])
    return module == "proj_out" and stored == (wanted[0] * wanted[1], *wanted[2:])


def _without(suffix: str, rule: matching.Rule) -> matching.Rule:
    return lambda path, stored, wanted: rule(path.removesuffix(suffix), stored, wanted)


def _tree(path: str | Path, content: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """The dictionary at a place of the file."""
    tree: Any = content
    for depth, name in enumerate(place):
        tree = tree.get(name)
        if not isinstance(tree, dict):
            where, is_there = "/".join(place[: depth + 1]), "nothing" if tree is None else type(tree).__name__
            raise WeightsError(f"{path} has no parameters at {where}: there is {is_there}.")
    return tree


def _whole(path: str | Path, name: str, value: Any) -> int:
    """A count; files derived from a run on several devices may hold one equal count per device."""
    array = np.asarray(value)
    counts = {int(n) for n in array.flat} if array.dtype.kind in "iu" and array.ndim <= 1 else set()
    if len(counts) != 1 or min(counts) < 0:
        raise WeightsError(f"{path}: {name} must be one whole number, 0 or more, got {str(value)[:80]}.")
    return counts.pop()
