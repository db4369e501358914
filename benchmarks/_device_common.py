"""What the parts of `device.py` share: printing rows, timing, parameters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusion_distill import Model

SECONDS = 3.0  # of each measurement


def show(what: str, **figures: Any) -> None:
    """Prints a row."""
    print(json.dumps({"what": what, **figures}), flush=True)


def guarded(what: str, work: Callable[[], dict[str, Any]]) -> None:
    """Prints what some work gives, or the first line of its error."""
    try:
        show(what, **work())
    except Exception as error:
        show(what, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200])


def seconds_of(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Seconds of a call, when calls follow each other without waiting for the device."""
    for _ in range(2):
        wait(call())
    begun = time.perf_counter()
    wait(call())
    count = max(1, int(SECONDS / max(time.perf_counter() - begun, 1e-6) / 3))
    rounds = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(count - 1):
            call()
        wait(call())
        rounds.append((time.perf_counter() - begun) / count)
    return sorted(rounds)[1]


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Parameters of usual sizes, on the host: nothing is compiled for them, and nothing is zero."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> np.ndarray:
        if jax.tree_util.keystr(path[-1:], simple=True) in ("scale", "var"):
            return np.ones(like.shape, np.float32)
        size = max(1, int(np.prod(like.shape[:-1]))) ** -0.5 if len(like.shape) > 1 else 0.01
        return size * rng.standard_normal(like.shape, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_params(model: Model) -> Any:
    """Such parameters of a model."""
    return random_like(jax.eval_shape(model.init, jax.random.key(0)))


def peak_memory() -> float | None:
    """GB that the first device has used at most, None where it does not tell."""
    return round(((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)) / 1e9, 2) or None
