"""The library's U-Net built from a fixture's constructor arguments, and its parameters from stored names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_distill.networks import UNet
from diffusion_distill.process.levels import from_logsnr
from diffusion_distill.process.processes import Cosine
from diffusion_distill.process.time_input import LogsnrInput
from golden_checks.common import FLOAT32, Fixture, exact


class Net(NamedTuple):
    """A network and how it is told the noise level."""

    network: UNet
    time_input: LogsnrInput


def unet_of(config: Mapping[str, Any]) -> Net:
    """The network of BTD's constructor arguments, which are the fields of UNet and LogsnrInput."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    kind = fields.pop("logsnr_input_type", "inv_cos")
    scale_range = fields.pop("logsnr_scale_range", None)
    time_input = LogsnrInput(kind, *map(float, scale_range)) if scale_range else LogsnrInput(kind)
    return Net(UNet(**fields), time_input)


def stored_params(fixture: Fixture, net: Net, prefix: str, x: np.ndarray) -> dict[str, Any]:
    """The parameters under a prefix, float32; reports whether names and shapes are exactly the network's."""
    keys = [key for key in fixture.arrays if key.startswith(prefix)]
    stored = {key[len(prefix) :]: fixture.input(key).astype(np.float32) for key in keys}
    key, label = jax.random.key(0), jnp.zeros(1, jnp.int32)
    wanted = jax.eval_shape(partial(net.network.init, train=False), key, x[:1], jnp.zeros(1), label)["params"]
    flat: dict[str, Any] = flatten_dict(wanted, sep="/")  # type: ignore[assignment]
    shapes = {name: value.shape for name, value in flat.items()}
    wrong = sorted(set(shapes.items()) ^ {(name, value.shape) for name, value in stored.items()})
    note = f": {wrong[:4]}" if wrong else ""
    fixture.report(f"{prefix}* ({len(stored)} names and shapes)", len(wrong), FLOAT32, exact(), note)
    return unflatten_dict({tuple(name.split("/")): jnp.asarray(value) for name, value in stored.items()})


def outputs(net: Net, params: Any, x: Any, logsnr: Any, labels: Any) -> tuple[Any, Any]:
    """(the network's output, its time embedding after both dense layers) for float32 inputs."""
    level = FLOAT32.tree(from_logsnr(np.asarray(logsnr, np.float64)))
    labels = None if labels is None else jnp.asarray(labels, jnp.int32).reshape(-1)
    run = jax.jit(partial(net.network.apply, train=False, capture_intermediates=_is_embedding))
    out, seen = run({"params": params}, FLOAT32.array(x), net.time_input.time(level, Cosine()), labels)
    return out, seen["intermediates"]["dense1"]["__call__"][0]  # type: ignore[index]


def _is_embedding(module: Any, method: str) -> bool:
    return module.name == "dense1" and method == "__call__"
