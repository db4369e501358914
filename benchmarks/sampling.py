"""What sampling costs beside the network calls that it needs, in the same run.

    python benchmarks/sampling.py [--devices 2] [--net demo] [--steps 8 --steps 64] [--solver heun] [--out FILE.json]

A solver with N evaluations calls the network N times for a batch. The bound is as many bare calls of the compiled
denoiser, each on the result of the one before. Beside it are a batch of a `Sampler`, with its noise and its way to the
host, and `sample`, which prepares a sampler and draws several batches. A guided batch is twice as large for the
network, so its bound is too. Where several CPU devices share a batch, bare calls also wait for each other
(`base.arrays.settled`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _device_common import random_params
from _nets import NETS
from _options import parser_of
from _rounds import Times, by_turns
from _verdicts import Verdict, compared, report

from diffusion_distill import Model, UNet, sample
from diffusion_distill.api.sampling import sampler_of
from diffusion_distill.base.arrays import settled
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.process.levels import Level
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.sharding import data_mesh, replicated, split, use_cpu_devices

GUIDED = "guided ddim"
#: One of every kind: one call a step, with memories, several calls a step, with fresh noise, guided.
SOLVERS = (
    "ddim",
    "ipndm",
    "deis",
    "dpm_solver++",
    "dpm_solver++ method=singlestep",
    "heun",
    "two_stage",
    "ancestral",
    GUIDED,
)
BATCHES = 4  # that `sample` draws
CLASSES = 10  # of the guided network
GOAL = 0.97  # of bare calls' speed


def bare_calls(denoise: Any, z: jax.Array, cond: jax.Array | None, count: int) -> Callable[[], object]:
    """So many calls of a denoiser on a batch, one after the other."""
    place = split(data_mesh())
    level = jax.device_put(Level(*(jnp.full(len(z), a, jnp.float32) for a in (0.6, 0.8))), place)
    placed = jax.device_put((z, cond), place)
    denoise = jax.device_put(denoise, replicated(data_mesh()))
    call = jax.jit(lambda denoise, z, level, cond: denoise(z, level, cond))

    def work() -> None:
        z, cond = placed
        for _ in range(count):
            z = settled(call(denoise, z, level, cond))
        jax.block_until_ready(z)

    return work


def measure(name: str, solver: str, steps: int, rounds: int) -> list[Verdict]:
    """The verdicts of one solver: on a batch, and on several."""
    (settings, image, batch), guided = NETS[name], solver == GUIDED
    model = Model(UNet(**settings, num_classes=CLASSES if guided else 1), image, prediction="v")
    artefact = Artefact(model, random_params(model))
    how: dict[str, Any] = {"solver": "ddim", "guidance": {"scale": 2.0}} if guided else {"solver": solver}
    sampler = sampler_of(artefact, steps=steps, **how)
    labels = np.arange(batch * BATCHES) % CLASSES if guided else None
    first = None if labels is None else labels[:batch]
    z = jax.random.normal(jax.random.key(0), (2 * batch if guided else batch, *image))
    cond = None if labels is None else jnp.asarray(labels[: len(z)])
    nfe = sampler.table.nfe
    found = by_turns(
        {
            "network": bare_calls(artefact.denoiser(clip=False), z, cond, nfe),
            "batch": lambda: sampler.draw(0, batch, first),
            "sample": lambda: sample(artefact, batch * BATCHES, steps, cond=labels, batch_size=batch, **how),
        },
        rounds,
        calls=1,
    )
    each = Times([seconds / BATCHES for seconds in found["sample"].seconds])
    calls = f"with {name} on {jax.device_count()} devices, beside {nfe} network calls"
    return [
        compared(f"a batch of {solver}, {steps} steps, {calls}", found["batch"], found["network"], GOAL),
        compared(f"each of {BATCHES} batches of sample(), {solver}, {calls}", each, found["network"], GOAL),
    ]


def main() -> None:
    """Measures the chosen solvers."""
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("--net", choices=NETS, default="demo")
    parser.add_argument("--steps", type=int, action="append", help="of the solver; may be repeated; 8 by default")
    parser.add_argument("--solver", action="append", help="in place of one of every kind; may be repeated")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    keep_compiled()
    found = []
    for solver in options.solver or SOLVERS:
        for steps in options.steps or [8]:
            found += measure(options.net, solver, steps, options.rounds)
            print(*found[-2:], sep="\n", flush=True)
    report(found, options.out)


if __name__ == "__main__":
    main()
