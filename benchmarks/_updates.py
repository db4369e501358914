"""What the benchmarks time: passes of a network, and whole training updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _device_common import random_params

from diffusion_distill import Model, OptimizerSettings
from diffusion_distill.denoisers import conditions
from diffusion_distill.methods import Denoising
from diffusion_distill.process.levels import Level
from diffusion_distill.training import ema, loop
from diffusion_distill.training.optimizers import make_optimizer
from diffusion_distill.training.sharding import data_mesh, replicated, split
from diffusion_distill.training.state import create
from diffusion_distill.training.step import StepInputs, make_step


def update_of(model: Model, method: Any, batch: int) -> tuple[Callable[[Any], Any], Any, tuple[Any, ...]]:
    """(what makes the state from parameters, the jitted step, its other arguments) of a method's first phase."""
    optimizer, teacher = make_optimizer(OptimizerSettings()), None if isinstance(method, Denoising) else model
    phase = method.phases(model, batch)[0]
    begin = lambda params: create(params, optimizer, method.averages, () if teacher is None else params)  # noqa: E731
    cond = conditions.structs(model, batch)
    data = {"x": images(model, batch)}
    if cond is not None:
        data["cond"] = np.zeros(cond.shape, np.int32)
    inputs = StepInputs(loop.rows_of(phase), np.float32(1e-4), ema.Averaging([phase], 0, method.averages).at(0))
    mesh = data_mesh()
    others = jax.device_put(data, split(mesh)), *jax.device_put((inputs, jax.random.key(0)), replicated(mesh))
    return begin, make_step(method.losses, model, teacher, optimizer, mesh), others


def updates(model: Model, begin: Callable[[Any], Any], step: Any, others: tuple[Any, ...]) -> Callable[[], object]:
    """A function that makes one update after the other and waits for each; the arguments are those of `update_of`."""
    state = jax.device_put(begin(random_params(model)), replicated(data_mesh()))

    def update() -> None:
        nonlocal state
        state, metrics = step(state, *others)
        jax.block_until_ready(metrics)

    return update


def passes(model: Model, batch: int) -> dict[str, Callable[[Any], object]]:
    """The network's forward pass, and that with its gradient, of images [batch, ...]; each is waited for."""
    mesh = data_mesh()
    params = jax.device_put(random_params(model), replicated(mesh))
    angles = np.linspace(0.1, 1.4, batch, dtype=np.float32)
    level = jax.device_put(Level(np.cos(angles), np.sin(angles)), split(mesh))

    def loss(params: Any, x: Any, level: Level) -> jax.Array:
        return jnp.mean(jnp.square(model.raw(params, x, level, None, None) - x))

    forward = jax.jit(lambda params, x, level: model.raw(params, x, level, None, None), out_shardings=split(mesh))
    gradient = jax.jit(jax.grad(loss), out_shardings=replicated(mesh))
    return {
        "forward": lambda x: jax.block_until_ready(forward(params, x, level)),
        "gradient": lambda x: jax.block_until_ready(gradient(params, x, level)),
    }


def images(model: Model, batch: int) -> np.ndarray:
    """Noise [batch, ...] in the range of images."""
    return np.random.default_rng(2).uniform(-1, 1, (batch, *model.shape)).astype(np.float32)
