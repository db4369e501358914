"""The speed of the U-Net, beside the rate of a plain matrix product measured in the same run.

    python benchmarks/networks.py [--devices 2] [--net demo] [--batch 128]

For each network: milliseconds of the forward pass and of loss and gradient (jitted, host loop, best of
several), the rate in GFLOP/s (XLA's own count of operations) and that rate over the matrix product's. The
batch is split over the devices; on a CPU one device per core is the cheapest gain, hence the default.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import jax
import jax.numpy as jnp
from _common import best_ms, matmul_rate
from _nets import NETS

from diffusion_distill.networks import UNet
from diffusion_distill.training.sharding import data_mesh, replicated, split, use_cpu_devices


def measure(name: str, batch: int | None, matmul: float) -> None:
    """Print one line per pass for the network called `name`."""
    settings, image, usual_batch = NETS[name]
    batch = batch or usual_batch
    whole, sharded = replicated(data_mesh()), split(data_mesh())
    x = jax.device_put(jax.random.normal(jax.random.key(0), (batch, *image)), sharded)
    t = jax.device_put(jnp.linspace(0.0, 1000.0, batch), sharded)
    net = UNet(**settings)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
    params = jax.tree.map(lambda leaf: 0.05 * jnp.ones(leaf.shape), shapes)
    params = jax.device_put(params, whole)

    def loss(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(net.apply({"params": params}, x, t) - x))  # pyright: ignore[reportOperatorIssue]

    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    print(f"{name}: {count / 1e6:.2f}M parameters, batch {batch} of {image}, {jax.device_count()} devices")
    passes = {
        "forward": jax.jit(lambda p, x, t: net.apply({"params": p}, x, t), out_shardings=sharded),
        "gradient": jax.jit(jax.value_and_grad(loss), out_shardings=whole),
    }
    for label, function in passes.items():
        compiled = function.lower(params, x, t).compile()
        flops = (function.lower(params, x, t).cost_analysis() or {})["flops"]  # of the whole batch, before it is split
        ms = best_ms(compiled, params, x, t)
        rate = flops / ms / 1e6
        print(f"  {label:8} {ms:8.1f} ms  {rate:6.0f} GFLOP/s  {rate / matmul:5.2f} of a matrix product")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="XLA devices to split a CPU into")
    parser.add_argument("--net", choices=[*NETS, "all"], default="all")
    parser.add_argument("--batch", type=int, default=None)
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    matmul = matmul_rate()
    print(f"matrix product: {matmul:.0f} GFLOP/s on all devices together")
    for name in NETS if options.net == "all" else [options.net]:
        measure(name, options.batch, matmul)


if __name__ == "__main__":
    main()
