"""How fast the U-Net runs here, beside the rate of a plain matrix product measured in the same run.

    python benchmarks/networks.py [--devices 2] [--net demo] [--batch 128]

For each network: milliseconds of the forward pass and of loss and gradient (jitted, host loop, best of
several), the rate in GFLOP/s (XLA's own count of operations) and that rate over the matrix product's. The
batch is split over the devices; on a CPU one device per core is the cheapest gain, hence the default.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

NETS: dict[str, tuple[dict[str, Any], tuple[int, int, int], int]] = {  # settings, image, batch
    "demo": (
        dict(ch=32, emb_ch=128, out_ch=1, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_heads=1),
        (8, 8, 1),
        128,
    ),
    "cifar64": (
        dict(
            ch=64,
            emb_ch=256,
            out_ch=3,
            ch_mult=(1, 1, 1),
            num_res_blocks=3,
            attn_resolutions=(8, 16),
            num_heads=1,
            resblock_resample=True,
        ),
        (32, 32, 3),
        8,
    ),
}


def best_ms(function: Callable, *arguments: Any, seconds: float = 3.0) -> float:
    """Milliseconds of the fastest call, compilation excluded."""
    import jax

    jax.block_until_ready(function(*arguments))
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def matmul_rate(size: int = 1024) -> float:
    """GFLOP/s of one float32 matrix product of `size`, a copy of it on every device at once."""
    import jax
    import jax.numpy as jnp

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    a = jax.device_put(jnp.ones((jax.device_count(), size, size)), sharded)
    product = jax.jit(lambda a, b: jnp.einsum("nij,njk->nik", a, b), out_shardings=sharded)
    return 2 * size**3 * jax.device_count() / best_ms(product, a, a) / 1e6


def measure(name: str, batch: int | None, matmul: float) -> None:
    """Print one line per pass for the network called `name`."""
    import jax
    import jax.numpy as jnp

    from diffusion_distill.networks import UNet

    settings, image, usual_batch = NETS[name]
    batch = batch or usual_batch
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, sharded = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (batch, *image)), sharded)
    t = jax.device_put(jnp.linspace(0.0, 1000.0, batch), sharded)
    net = UNet(**settings)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
    params = jax.tree.map(lambda leaf: 0.05 * jnp.ones(leaf.shape), shapes)
    params = jax.device_put(params, replicated)

    def loss(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(net.apply({"params": params}, x, t) - x))  # pyright: ignore[reportOperatorIssue]

    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    print(f"{name}: {count / 1e6:.2f}M parameters, batch {batch} of {image}, {jax.device_count()} devices")
    passes = {
        "forward": jax.jit(lambda p, x, t: net.apply({"params": p}, x, t), out_shardings=sharded),
        "gradient": jax.jit(jax.value_and_grad(loss), out_shardings=replicated),
    }
    for label, function in passes.items():
        compiled = function.lower(params, x, t).compile()
        whole = function.lower(params, x, t).cost_analysis() or {}  # of the whole batch, before it is split
        flops = whole["flops"]
        ms = best_ms(compiled, params, x, t)
        rate = flops / ms / 1e6
        print(f"  {label:8} {ms:8.1f} ms  {rate:6.0f} GFLOP/s  {rate / matmul:5.2f} of a matrix product")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="XLA devices to split a CPU into")
    parser.add_argument("--net", choices=[*NETS, "all"], default="all")
    parser.add_argument("--batch", type=int, default=None)
    options = parser.parse_args()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    os.environ["XLA_FLAGS"] = flags.strip()  # read when jax starts, hence the imports inside the functions

    matmul = matmul_rate()
    print(f"matrix product: {matmul:.0f} GFLOP/s on all devices together")
    for name in NETS if options.net == "all" else [options.net]:
        measure(name, options.batch, matmul)


if __name__ == "__main__":
    main()
