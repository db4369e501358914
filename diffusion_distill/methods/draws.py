"""What a loss draws for a batch: times and noise, the same numbers whether it is worked through at once or in parts."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from diffusion_distill.base.arrays import Array, stratified
from diffusion_distill.base.typing import Batch, Data, Key


class Part(struct.PyTreeNode):
    """Which samples of a whole batch a batch has; training puts it there as batch["part"].

    Attributes:
      key: of the whole batch.
      number: the samples are number, number + of, number + 2·of, ... of the whole batch, counted from 0.
      of: how many parts the whole batch has.
    """

    key: Key
    number: Array
    of: int = struct.field(pytree_node=False)


def draw(batch: Batch, key: Key) -> tuple[Array, Data]:
    """Uniform numbers in [0, 1), [batch], stratified over the whole batch, and unit noise like batch["x"].

    They come from two streams of the key. Of a part of a batch they are those that the whole batch would draw with its
    own key, so that the gradient of the parts is that of the whole.
    """
    x, part = batch["x"], batch.get("part")
    count = x.shape[0] * (1 if part is None else part.of)
    times, noise = jax.random.split(key if part is None else part.key)
    whole = stratified(times, count), jax.random.normal(noise, (count, *x.shape[1:]), x.dtype)
    return whole if part is None else jax.tree.map(lambda a: every(a, part.of)[part.number], whole)


def every(array: Any, parts: int) -> Any:
    """[batch, ...] -> [parts, batch / parts, ...]: part k has the samples k, k + parts, k + 2·parts, ..."""
    return array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1)
