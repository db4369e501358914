"""Whole training updates, beside PyTorch's of the same network in the same run.

    python benchmarks/steps.py [--devices 2] [--net demo] [--method Tract] [--rounds 6] [--out FILE.json]

A teacher's update is one network gradient, Adam and the average; one of TRACT adds the teacher's and the self-teacher's
forward passes. The peer is `_torch_peer.py`, eager and through torch.compile, with as many threads as we have devices;
it needs PyTorch (the extra [bench]), in this environment or in the Python that the variable PEER_PYTHON names. A ratio
above 1 means that ours is ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _nets import NETS
from _rounds import in_turn, ratio, serve

METHODS = ("Denoising", "Tract")


def ours(name: str, method_name: str, devices: int) -> Callable[[], object]:
    """Our update, compiled."""
    import jax
    import numpy as np

    from diffusion_distill import Denoising, Model, OptimizerSettings, Tract, UNet
    from diffusion_distill.training import ema, loop
    from diffusion_distill.training.optimizers import make_optimizer
    from diffusion_distill.training.sharding import data_mesh, put_batch, replicated, use_cpu_devices
    from diffusion_distill.training.state import create
    from diffusion_distill.training.step import StepInputs, make_step

    use_cpu_devices(devices)
    settings, image, batch_size = NETS[name]
    model, mesh = Model(UNet(**settings), image, prediction="v"), data_mesh()
    params = model.init(jax.random.key(0))
    optimizer = make_optimizer(OptimizerSettings())
    batch = put_batch({"x": jax.device_get(jax.random.uniform(jax.random.key(1), (batch_size, *image)))}, mesh)
    method: Any = {"Denoising": Denoising(), "Tract": Tract((32, 1))}[method_name]
    teacher = model if method_name == "Tract" else None
    phase = method.phases(model, batch_size)[0]
    state = jax.device_put(create(params, optimizer, method.averages, params if teacher else ()), replicated(mesh))
    weights = ema.Averaging([phase], 0, method.averages).at(0)
    inputs = jax.device_put(StepInputs(loop.rows_of(phase), np.float32(1e-4), weights), replicated(mesh))
    step, key = make_step(method.losses, model, teacher, optimizer, mesh), jax.random.key(0)

    def update() -> None:
        nonlocal state
        state, metrics = step(state, batch, inputs, key)
        jax.block_until_ready(metrics)

    return update


def theirs(name: str, threads: int, compiled: bool) -> Callable[[], object]:
    """PyTorch's TRACT update."""
    import numpy as np
    import torch  # type: ignore[import-not-found]
    from _torch_peer import Tract, UNet

    torch.set_num_threads(threads)
    settings, image, batch_size = NETS[name]
    angle = np.linspace(0.01, 0.99, 33)[::-1] * np.pi / 2
    alpha, sigma = np.cos(angle), np.sin(angle)
    decay = sigma[1:] / sigma[:-1]
    rows = {"time_t": 1000 * angle[:-1], "alpha_t": alpha[:-1], "sigma_t": sigma[:-1]}
    rows |= {"time_m": 1000 * angle[1:], "alpha_m": alpha[1:], "sigma_m": sigma[1:]}
    rows |= {"r": decay, "d": alpha[1:] - alpha[:-1] * decay, "first": np.full(32, 0.3), "second": np.full(32, 0.7)}
    update = Tract(lambda: UNet(image[-1], size=image[0], **settings), rows, compiled=compiled)
    x = torch.rand(batch_size, image[-1], *image[:2]).to(memory_format=torch.channels_last)
    return lambda: float(update(x))


def measure(name: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the times of one network and method."""
    own = [sys.executable, __file__, "--net", name, "--method", method, "--devices", str(options.devices), "--serve"]
    workers = {"ours": [*own, "ours"]}
    if method == "Tract":
        own[0] = os.environ.get("PEER_PYTHON", sys.executable)
        workers |= {peer: [*own, peer] for peer in ("PyTorch", "PyTorch compiled")}
    found = in_turn(workers, options.rounds)
    image, batch = NETS[name][1:]
    print(f"{name}, {method}, batch {batch} of {image}, {options.devices} devices", flush=True)
    record: dict[str, Any] = {"net": name, "method": method, "batch": batch, "devices": options.devices}
    for who, times in found.items():
        against = "" if who == "ours" else f"  ours is {ratio(found['ours'], times):.2f} times as fast"
        print(f"  {who:17}{times}{against}", flush=True)
        record[who] = {"median": times.median, "spread": times.spread}
    return record


def main() -> None:
    """Measures the chosen networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="devices to split a CPU into")
    parser.add_argument("--net", choices=[*NETS, "all"], default="all")
    parser.add_argument("--method", choices=[*METHODS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve == "ours":
        return serve(ours(options.net, options.method, options.devices))
    if options.serve:
        return serve(theirs(options.net, options.devices, options.serve == "PyTorch compiled"))
    nets = NETS if options.net == "all" else [options.net]
    methods = METHODS if options.method == "all" else [options.method]
    records = [measure(name, method, options) for name in nets for method in methods]
    if options.out:
        options.out.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
