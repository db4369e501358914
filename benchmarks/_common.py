"""Shared by the benchmarks: timing, and the machine's matrix-product rate as a yardstick."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_distill.training.sharding import data_mesh, split


def times_ms(function: Callable, *arguments: Any, seconds: float = 3.0) -> list[float]:
    """Milliseconds of repeated calls, compilation excluded."""
    jax.block_until_ready(function(*arguments))
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1000 * (time.perf_counter() - start))
    return times


def best_ms(function: Callable, *arguments: Any) -> float:
    """Milliseconds of the fastest call."""
    return min(times_ms(function, *arguments))


def median_ms(function: Callable, *arguments: Any) -> float:
    """Milliseconds of a usual call."""
    return sorted(times := times_ms(function, *arguments))[len(times) // 2]


def matmul_rate(size: int = 1024) -> float:
    """GFLOP/s of one float32 matrix product of `size`, a copy of it on every device at once."""
    sharded = split(data_mesh())
    a = jax.device_put(jnp.ones((jax.device_count(), size, size)), sharded)
    product = jax.jit(lambda a, b: jnp.einsum("nij,njk->nik", a, b), out_shardings=sharded)
    return 2 * size**3 * jax.device_count() / best_ms(product, a, a) / 1e6
