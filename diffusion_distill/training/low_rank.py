"""Students as low-rank adapters of their teacher: LoRA, arXiv:2106.09685, on trees of parameters.

    W = W_0 + down·up        W_0 [fan_in, out] the teacher's kernel, frozen; down [fan_in, r], up [r, out] trained

`down` begins random and `up` at zero, so that the student begins as the teacher. The teacher of a later phase, and each
average, is a pair (down, up) too, so that all roles share one W_0. Networks know nothing of it: a role's parameters are
merged before they are called, and an artefact has the merged ones.

Which sides a kernel has, as a matrix, follows from its axes:

    2, 4 and more   [..., out]: products, and convolutions [height, width, in, out]
    3               split where the two sides are nearest to each other: attention's [in, heads, channels] and
                    [heads, channels, out]

The paper's factor alpha / r is left out: with Adam, the learning rate does what it does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import log, prod
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.trees import names
from diffusion_distill.base.typing import Key, Params

#: What is adapted if nothing else is asked for: leaves called 'kernel', as Flax calls them.
KERNELS = r"(^|/)kernel$"
#: Number, folded into a run's key, of the randomness of adapters.
STREAM = 0x4C4F5241


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"low_rank_pattern must be a regular expression, got {pattern!r}: {error}.") from error


def init(key: Key, base: Params, rank: int, pattern: str = "") -> Params:
    """Adapters that change nothing yet; biases, scales and whatever else is not matched has none and stays frozen.

    Args:
      base: parameters, any tree.
      rank: r; at most the shorter side of a kernel is taken.
      pattern: regular expression, searched in names such as 'mid.block_1/conv1/kernel'; `KERNELS` if empty. Leaves
        with less than two axes have no adapters, nor have biases, of which attention's have two.

    Returns:
      Nested dictionaries; in the place of each kernel {"down": [fan_in, r], "up": [r, out]}. The elements of `down`
      have variance 1 / (3·fan_in), as the paper's program has them.

    Raises:
      ValueError: nothing matches.
    """
    large = {place: leaf for place, leaf in _leaves(base) if leaf.ndim > 1 and place[-1] != "bias"}
    chosen = [place for place in large if re.search(pattern or KERNELS, "/".join(place))]
    if not chosen:
        there = ", ".join("/".join(place) for place in large)
        raise ValueError(
            f"No parameter with two axes or more matches low_rank_pattern={pattern or KERNELS!r}. There are: "
            f"{there[:400] or 'none'}."
        )
    keys = jax.random.split(key, len(chosen))
    return unflatten_dict({place: _pair(own, large[place], rank) for place, own in zip(chosen, keys, strict=True)})


def merged(base: Params, adapters: Params) -> Params:
    """The tree of `base` with W_0 + down·up in the place of each kernel W_0 that has an adapter."""
    factors = flatten_dict(adapters)
    found = [_changed(leaf, place, factors) if (*place, "up") in factors else leaf for place, leaf in _leaves(base)]
    return jax.tree.unflatten(jax.tree.structure(base), found)


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, out) of a kernel as a matrix, see above."""
    splits = [(prod(shape[:k]), prod(shape[k:])) for k in range(1, len(shape))]
    return min(splits[::-1], key=lambda s: abs(log(s[0] / s[1]))) if len(shape) == 3 else splits[-1]


def _pair(key: Key, kernel: Array, rank: int) -> dict[str, Array]:
    fan_in, out = sides(kernel.shape)
    rank, bound = min(rank, fan_in, out), fan_in**-0.5
    down = jax.random.uniform(key, (fan_in, rank), kernel.dtype, -bound, bound)
    return {"down": down, "up": jnp.zeros((rank, out), kernel.dtype)}


def _changed(kernel: Array, place: tuple[str, ...], factors: Mapping[tuple[str, ...], Array]) -> Array:
    # Exact on every device: an artefact is to be what was trained, though another program merges it.
    change = jnp.matmul(factors[*place, "down"], factors[*place, "up"], precision="highest")
    return kernel + change.reshape(kernel.shape)


def _leaves(tree: Params) -> list[tuple[tuple[str, ...], Any]]:
    return [(tuple(names(path)), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
