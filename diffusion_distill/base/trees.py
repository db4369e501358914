"""Trees of arrays: as nested dictionaries of names, for files, and as hashable values, for what jit compiles once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def to_plain(tree: Any) -> dict[str, Any]:
    """A tree as nested dictionaries whose keys are text, whatever its nodes are: lists, tuples, modules.

    Args:
      tree: any JAX tree. A trailing 'value', which Flax NNX has below each of its variables, is left out of the names.

    Returns:
      The leaves by the names of their places; a tree that is one leaf is {"leaf": it}.

    Raises:
      ValueError: two leaves have the same names, such as those of the keys 1 and "1".
    """
    plain: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *above, name = names(path) or ["leaf"]
        folder = plain
        for part in above:
            folder = folder.setdefault(part, {})
        if name in folder:
            raise ValueError(f"Two leaves of the tree are called {'.'.join(map(str, (*above, name)))}. Rename one.")
        folder[name] = leaf
    return plain


def from_plain(plain: Any, like: Any) -> Any:
    """The tree with the structure of `like` whose leaves `to_plain` put into nested dictionaries.

    Raises:
      ValueError: a leaf of `like` is missing.
    """
    places, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [_leaf(plain, names(path) or ["leaf"]) for path, _ in places])


def _leaf(plain: Any, place: list[str]) -> Any:
    for name in place:
        if not isinstance(plain, Mapping) or name not in plain:
            raise ValueError(f"There is no array {'.'.join(place)}.")
        plain = plain[name]
    return plain


def names(path: tuple) -> list[str]:
    """The names on the way to a leaf, from the path that JAX gives; none for a tree that is one leaf."""
    found = [str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a))) for key in path]
    if len(found) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and found[-1] == "value":
        found.pop()
    return found


def filled(tree: Any, part: Any) -> Any:
    """`tree` with the leaves of `part` in the places of the same names; unchanged if one has no place of its shape."""
    known = {tuple(names(path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]}
    places, structure = jax.tree_util.tree_flatten_with_path(tree)
    shapes = {tuple(names(path)): np.shape(leaf) for path, leaf in places}
    if any(shapes.get(place) != np.shape(leaf) for place, leaf in known.items()):
        return tree
    return jax.tree.unflatten(structure, [known.get(tuple(names(path)), leaf) for path, leaf in places])


class Fixed:
    """A tree as a value that can be hashed and compared by its content, so that jit may treat it as constant.

    Attributes:
      tree: leaves are NumPy arrays, `jax.ShapeDtypeStruct`s, or hashable values such as functions.
    """

    def __init__(self, tree: Any):
        self.tree = jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
        leaves, structure = jax.tree.flatten(self.tree)
        self._content = (structure, *map(_content, leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        return f"Fixed({self.tree!r})"


def _content(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, leaf.dtype.str, leaf.tobytes()
    return (leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
