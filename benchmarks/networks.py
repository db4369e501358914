"""The U-Net's passes, beside a plain matrix product of as many FLOPs in the same run.

    python benchmarks/networks.py [--devices 2] [--net demo] [--batch 128] [--rounds 5] [--out FILE.json]

The forward pass and the gradient are timed in turn with a float32 matrix product, a copy of it on every device at once.
The bound is the time that the FLOPs of a pass, counted from its shapes (`base/flops.py`), would take at the product's
rate. No convolution reaches it, and norms and activations have no FLOPs in this count: half of it is the goal.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from _device_common import random_params
from _nets import NETS, model_of
from _options import parser_of
from _rounds import by_turns
from _updates import images, passes
from _verdicts import Verdict, bounded, milliseconds, report

from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.training.sharding import data_mesh, put_batch, split, use_cpu_devices
from diffusion_distill.training.utilisation import forward_flops

GOAL = 0.5
SIZE = 1024  # of the square matrices
PASSES = {"forward": 1, "gradient": 3}  # FLOPs in forward passes: a product has two gradients of its own size
PRODUCTS = 10  # in a call, so that it takes some milliseconds


def products() -> tuple[Callable[[], object], float]:
    """A function that multiplies matrices on every device, and its FLOPs."""
    sharded = split(data_mesh())
    a = jax.device_put(jnp.ones((jax.device_count(), SIZE, SIZE)), sharded)
    product = jax.jit(lambda a, b: jnp.einsum("nij,njk->nik", a, b), out_shardings=sharded)
    work = lambda: jax.block_until_ready([product(a, a) for _ in range(PRODUCTS)])  # noqa: E731
    return work, 2.0 * PRODUCTS * SIZE**3 * jax.device_count()


def measure(name: str, batch: int, rounds: int) -> list[Verdict]:
    """The verdict of each pass."""
    model = model_of(name)
    x = put_batch({"x": images(model, batch)}, data_mesh())["x"]
    multiply, flops = products()
    works = {kind: lambda call=call: call(x) for kind, call in passes(model, batch).items()}
    found = by_turns({"product": multiply, **works}, rounds)
    product = found["product"]
    beside = f"beside its FLOPs in a matrix product, {flops / product.median / 1e9:.0f} GFLOP/s"
    forward = batch * forward_flops(model, random_params(model))
    return [
        bounded(
            f"{kind} of {name}, batch {batch}, {beside}",
            milliseconds(found[kind]),
            milliseconds(product, times * forward / flops),
            GOAL,
        )
        for kind, times in PASSES.items()
    ]


def main() -> None:
    """Measures the chosen networks."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--net", choices=[*NETS, "all"], default="all")
    parser.add_argument("--batch", type=int, help="in place of the network's own")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    keep_compiled()
    nets = NETS if options.net == "all" else [options.net]
    batches = {name: options.batch or NETS[name][-1] for name in nets}
    report([v for name in nets for v in measure(name, batches[name], options.rounds)], options.out)


if __name__ == "__main__":
    main()
