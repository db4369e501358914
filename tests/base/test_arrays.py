"""Loops on the host wait for several CPU devices, and for nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distill import Cosine
from diffusion_distill.base.arrays import settled
from diffusion_distill.process.grids import make_grid
from diffusion_distill.solvers import engine, tabulate
from diffusion_distill.training.sharding import data_mesh, split

pytestmark = pytest.mark.fast


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was waited for."""
    found: list[Any] = []
    monkeypatch.setattr(jax, "block_until_ready", lambda values: found.append(values) or values)
    return found


@pytest.mark.parametrize(("devices", "expected"), [(1, 0), (8, 1)])
def test_what_is_waited_for(devices: int, expected: int, waits: list[Any]) -> None:
    values = {"a": jax.device_put(jnp.ones(8), split(data_mesh(jax.devices()[:devices])))}
    assert settled(values) is values
    assert len(waits) == expected
    settled((np.ones(2), None))
    jax.jit(settled)(values)
    assert len(waits) == expected


def test_a_solver_waits_after_each_row(waits: list[Any]) -> None:
    table = tabulate("ddim", make_grid(Cosine(), 5))
    start = jax.device_put(jnp.ones((8, 2)), split(data_mesh()))
    engine.integrate(lambda z, level, cond=None: 0.5 * z, table, start)
    assert len(waits) == table.nfe
