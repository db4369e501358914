"""Teachers and self-teachers are evaluated only: the gradient knows the student alone."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxprs import convolutions

from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Progressive, Tract
from diffusion_distill.networks import UNet
from diffusion_distill.training import loop

NETWORK = UNet(ch=32, emb_ch=8, out_ch=1, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), num_heads=1)
MODEL = Model(NETWORK, (4, 4, 1), prediction="v")
BATCH = {"x": jax.ShapeDtypeStruct((8, 4, 4, 1), jnp.float32)}
#: Methods and how often they evaluate a network for the target.
METHODS: dict[str, tuple[Any, int]] = {
    "denoising": (Denoising(length="1K"), 0),
    "btd": (Progressive(8, 4, phase_length="1K"), 2),
    "tract": (Tract((8, 1), length="1K"), 2),
    "tract heun": (Tract.edm((8, 1), length="1K"), 3),
}


def loss_of(method: Any) -> Any:
    """The mean loss of a student's parameters; teachers have other ones."""
    rows = jax.tree.map(jnp.asarray, loop.rows_of(method.phases(MODEL, 8)[0]))

    def loss(params: Any, others: Any, batch: Any, key: Any) -> Any:
        denoisers = {name: MODEL.denoiser(others) for name in ("teacher", "self_teacher")}
        return jnp.mean(method.losses({**denoisers, "student": MODEL.denoiser(params)}, rows, batch, key))

    return loss


PARAMS, KEY = (jax.eval_shape(make) for make in (lambda: MODEL.init(jax.random.key(0)), lambda: jax.random.key(0)))


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_has_three_convolutions_for_each_of_the_students_and_one_for_each_of_a_teachers(name: str) -> None:
    method, evaluations = METHODS[name]
    z, time = jnp.zeros((8, 4, 4, 1)), jnp.zeros(8)
    once = convolutions(jax.make_jaxpr(NETWORK.apply)({"params": PARAMS}, z, time).jaxpr)
    traced = jax.make_jaxpr(jax.value_and_grad(loss_of(method)))(PARAMS, PARAMS, BATCH, KEY)
    # The first convolution has no gradient of its input.
    assert convolutions(traced.jaxpr) == 3 * once - 1 + evaluations * once


@pytest.mark.parametrize("name", [name for name, (_, evaluations) in METHODS.items() if evaluations])
def test_nothing_of_a_teachers_evaluation_is_kept_for_the_gradient(name: str) -> None:
    def kept(method: Any) -> int:
        """The number of values that the backward pass is given, parameters aside."""
        pull = jax.eval_shape(lambda *a: jax.vjp(lambda p: loss_of(method)(p, *a[1:]), a[0])[1], *ARGUMENTS)
        return sum(prod(leaf.shape) for leaf in jax.tree.leaves(pull))

    images = prod(BATCH["x"].shape)
    alone = kept(METHODS["denoising"][0])
    assert alone > 50 * images
    assert kept(METHODS[name][0]) <= alone + 4 * images  # a target is an image


ARGUMENTS = PARAMS, PARAMS, BATCH, KEY
