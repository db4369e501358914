"""The gradient of a batch: taken at once, in parts, or clipped on each device's share.

    global       gradient of the mean over the global batch; clipping is the optimizer's
    in parts     the mean of the gradients of `parts` equal parts of the batch, one after another, in the memory of one:
                 the global gradient but for rounding, except that dropout draws for each part anew
    per shard    each device clips the gradient of its own share, then they are averaged: BTD's program. The
                 result depends on the number of devices; with one it is clipping to the global norm.

Where the state is split over devices, the parameters are gathered for the loss, each when it is needed, and of the
gradient each device keeps the share that it updates.

A gradient function maps (params, state, batch, rows, key) to (loss, gradient, norm), the norm before clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Batch, Key, Params
from diffusion_distill.methods.draws import Part, every
from diffusion_distill.training.sharding import gathered, on_cpu, scattered

if TYPE_CHECKING:
    import optax

Gradient = Callable[[Params, Any, Batch, Any, Key], tuple[Array, Params, Array]]


def gradient_of(
    mean_loss: Callable[..., Array], parts: int, mesh: Mesh, shard_clip: optax.GradientTransformation | None
) -> Gradient:
    """The gradient function of mean_loss(params, state, batch, rows, key).

    Args:
      parts: how many parts a batch is worked through in; divides each device's share.
      shard_clip: acts on each device's gradient before averaging; None for one gradient of the global batch.
    """
    import optax

    at_once = jax.value_and_grad(mean_loss) if shard_clip is not None else _at_split(mean_loss, mesh)
    gradient = _in_parts(at_once, parts, straight=on_cpu(mesh))

    def measured(*arguments: Any) -> tuple[Array, Params, Array]:
        loss, grad = gradient(*arguments)
        return loss, grad, optax.tree.norm(grad)

    return measured if shard_clip is None else _per_shard(measured, mesh, shard_clip)


def _at_split(mean_loss: Callable[..., Array], mesh: Mesh) -> Callable[..., tuple[Array, Params]]:
    """Loss and gradient at parameters that may be split over devices; the gradient is split as they are."""

    def loss_at(params: Params, state: Any, *rest: Any) -> Array:
        # What the loss does not use is not moved.
        return mean_loss(gathered(params, mesh), gathered(state, mesh), *rest)

    def gradient(*arguments: Any) -> tuple[Array, Params]:
        loss, grad = jax.value_and_grad(loss_at)(*arguments)
        return loss, scattered(grad, mesh)

    return gradient


def _in_parts(
    gradient: Callable[..., tuple[Array, Params]], parts: int, straight: bool
) -> Callable[..., tuple[Array, Params]]:
    """The mean of the gradients of parts of the batch; in straight code or in a loop."""
    if parts == 1:
        return gradient

    def accumulated(params: Params, state: Any, batch: Batch, rows: Any, key: Key) -> tuple[Array, Params]:
        # Every parts-th image: a part is spread over the devices as the batch is, so nothing moves.
        split = jax.tree.map(partial(every, parts=parts), batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            number, images = part
            part = {**images, "part": Part(key, number, parts)}
            found = gradient(params, state, part, rows, jax.random.fold_in(key, number))
            return jax.tree.map(lambda sum_, new: sum_ + new / parts, total, found), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, (jnp.arange(parts), split), unroll=parts if straight else 1)[0]

    return accumulated


def _per_shard(measured: Gradient, mesh: Mesh, clip: optax.GradientTransformation) -> Gradient:
    """Clips the gradient of each device's share of the batch, then averages gradients, losses and norms."""

    def of_share(params: Params, state: Any, batch: Batch, rows: Any, key: Key) -> tuple[Array, Params, Array]:
        key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names))
        loss, grad, norm = measured(params, state, batch, rows, key)
        return jax.lax.pmean((loss, clip.update(grad, clip.init(params))[0], norm), mesh.axis_names)

    whole, share = PartitionSpec(), PartitionSpec(mesh.axis_names)
    # Without varying-axes checks a gradient is that of the share alone; with them it would be summed already.
    of_all = jax.shard_map(
        of_share, mesh=mesh, in_specs=(whole, whole, share, whole, whole), out_specs=whole, check_vma=False
    )

    def gradient(*arguments: Any) -> tuple[Array, Params, Array]:
        loss, grad, norm = of_all(*arguments)
        return loss, scattered(grad, mesh), norm

    return gradient
