"""The cost of fitting a D-ODE solver, beside that of its network evaluations alone, measured in the same run.

    python benchmarks/dode.py [--devices 2] [--net demo] [--steps 10] [--scale 10] [--batch 100]

A fit of N evaluations with scale C calls the network (C + 1)·N times on one batch: that is the bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
from _nets import NETS

from diffusion_distill import Model, UNet
from diffusion_distill.api import grid_for
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers import ddim, dode, engine, tabulate
from diffusion_distill.training.sharding import data_mesh, devices_for, replicated, split, use_cpu_devices

ROUNDS = 7


def measure(name: str, steps: int, scale: int, batch: int) -> None:
    """Prints one line per solver for the network called `name`."""
    settings, image, _ = NETS[name]
    model, mesh = Model(UNet(**settings), image, prediction="v"), data_mesh(devices_for(batch))
    denoise = jax.device_put(model.denoiser(model.init(jax.random.key(0))), replicated(mesh))
    keys = jax.device_put(engine.sample_keys(jax.random.key(1), jnp.arange(batch)), split(mesh))
    start = engine.noise(keys, 0, image)
    level = jax.device_put(Level(*(jnp.full(batch, a) for a in (0.6, 0.8))), split(mesh))
    call = jax.jit(lambda denoise, z: denoise(z, level))

    def network_alone() -> None:
        z = start
        for _ in range((scale + 1) * steps):
            z = call(denoise, z)
        jax.block_until_ready(z)

    for solver in ("ddim", "ipndm", "dpm_solver++ method=singlestep", "ddim-all"):
        student = tabulate(solver, grid_for(model, steps))
        teacher = dode.nested(student, model.process, scale, ddim)
        fit = lambda: dode.fit(denoise, student, teacher, start)  # noqa: E731
        found = []
        for _ in range(ROUNDS + 1):
            seconds = []
            for work in (network_alone, fit):
                begun = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begun)
            found.append(seconds)
        alone, whole = (statistics.median(part) for part in zip(*found[1:], strict=True))  # the first compiles
        calls = f"{(scale + 1) * steps} calls of {batch} images"
        ratio = statistics.median(b / a for a, b in found[1:])
        print(f"{name:8s} D-{solver:32s} {calls}: alone {alone:.2f} s, fit {whole:.2f} s, fit / alone {ratio:.3f}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--net", choices=NETS, default="demo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100)
    arguments = parser.parse_args()
    use_cpu_devices(arguments.devices)
    measure(arguments.net, arguments.steps, arguments.scale, arguments.batch)


if __name__ == "__main__":
    main()
