"""Images per second of whole training steps, beside the rate of a plain matrix product measured in the same run.

    python benchmarks/steps.py [--devices 2] [--net demo]

A teacher step is one network gradient, Adam and the average; a TRACT step adds the teacher's and the
self-teacher's forward passes. For the demo's network and the CIFAR-10 U-Net at width 64, batch 8.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import jax
import numpy as np
from _common import NETS, matmul_rate, median_ms

from diffusion_distill import Denoising, Model, OptimizerSettings, Tract, UNet
from diffusion_distill.training import ema, loop
from diffusion_distill.training.optimizers import make_optimizer
from diffusion_distill.training.sharding import data_mesh, put_batch, replicated, use_cpu_devices
from diffusion_distill.training.state import create
from diffusion_distill.training.step import StepInputs, make_step


def measure(name: str, matmul: float) -> None:
    """Prints one line per method for the network called `name`."""
    settings, image, batch_size = NETS[name]
    model, mesh = Model(UNet(**settings), image), data_mesh()
    params = model.init(jax.random.key(0))
    optimizer = make_optimizer(OptimizerSettings())
    batch = put_batch({"x": jax.device_get(jax.random.uniform(jax.random.key(1), (batch_size, *image)))}, mesh)
    methods: list[tuple[Any, Model | None]] = [(Denoising(), None), (Tract((32, 1)), model)]
    for method, teacher in methods:
        phase = method.phases(model, batch_size)[0]
        state = create(params, optimizer, method.averages, () if teacher is None else params)
        state = jax.device_put(state, replicated(mesh))
        weights = ema.Averaging([phase], 0, method.averages).at(0)
        inputs = jax.device_put(StepInputs(loop.rows_of(phase), np.float32(0), weights), replicated(mesh))
        step = make_step(method.losses, model, teacher, optimizer, mesh)
        lowered = step.lower(state, batch, inputs, jax.random.key(0))
        flops = (lowered.cost_analysis() or {})["flops"]
        compiled = lowered.compile()

        def advance(compiled=compiled, inputs=inputs):
            nonlocal state
            state, metrics = compiled(state, batch, inputs, jax.random.key(0))
            return metrics

        ms = median_ms(advance)
        rate = flops / ms / 1e6
        speed = f"{ms:8.1f} ms {1000 * batch_size / ms:8.0f} images/s {rate:6.0f} GFLOP/s"
        print(f"{name:8} {type(method).__name__:10} batch {batch_size:4} {speed}, {rate / matmul:4.2f} of matmul")


def main() -> None:
    """Measures the chosen networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="devices to split a CPU into")
    parser.add_argument("--net", choices=[*NETS, "all"], default="all")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    matmul = matmul_rate()
    print(f"matrix product: {matmul:.0f} GFLOP/s on all {jax.device_count()} devices together")
    for name in NETS if options.net == "all" else [options.net]:
        measure(name, matmul)


if __name__ == "__main__":
    main()
