"""Whole training updates: TRACT's beside PyTorch's of the same network, a teacher's beside its gradient alone.

    python benchmarks/steps.py [--devices 2] [--net demo] [--method Tract] [--rounds 6] [--out FILE.json]

A teacher's update is one network gradient, Adam and the average; one of TRACT adds the teacher's and the self-teacher's
forward passes. The peer of TRACT's is `_torch_peer.py`, eager and through torch.compile, with as many threads as we
have devices; it needs PyTorch (the extra [bench]), in this environment or in the Python that the variable PEER_PYTHON
names. A ratio above 1 means that ours is ahead. All run in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from _nets import NETS, model_of
from _options import parser_of
from _rounds import in_turn, serve
from _updates import images, passes, update_of, updates
from _verdicts import Verdict, alone, compared, report

from diffusion_distill import Denoising, Tract
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.training.sharding import data_mesh, put_batch, use_cpu_devices

METHODS = {"Denoising": Denoising(), "Tract": Tract((32, 1))}
#: The least share of a teacher's update that its gradient should take: the rest is the loss, Adam and the average.
GRADIENT = 0.9
#: Measured only if the network is named: minutes for what the smaller networks tell too.
SELDOM = {("cifar128", "Denoising")}
SECONDS = 60.0  # of a network and method, after which no further round is begun


def ours(name: str, work: str) -> Callable[[], object]:
    """An update of ours, or the gradient alone."""
    model, batch = model_of(name), NETS[name][-1]
    if work == "gradient":
        gradient, x = passes(model, batch)["gradient"], put_batch({"x": images(model, batch)}, data_mesh())["x"]
        return lambda: gradient(x)
    return updates(model, *update_of(model, METHODS[work], batch))


def command_of(name: str, work: str, devices: int) -> list[str]:
    """The command line of a worker that serves `ours`."""
    return [sys.executable, __file__, f"--net={name}", f"--serve={work}", f"--devices={devices}"]


def measure(name: str, method: str, options: argparse.Namespace) -> list[Verdict]:
    """The verdicts on a network and method."""
    workers = {"ours": command_of(name, method, options.devices)}
    if method == "Tract":
        peer = [os.environ.get("PEER_PYTHON", sys.executable), str(Path(__file__).with_name("_torch_worker.py"))]
        peer += [json.dumps(NETS[name]), f"--threads={options.devices}"]
        others, goal = {"PyTorch": peer, "compiled PyTorch": [*peer, "--compiled"]}, 1.0
    else:
        others, goal = {"its gradient alone": command_of(name, "gradient", options.devices)}, GRADIENT
    found = in_turn(workers | others, options.rounds, calls=2, seconds=SECONDS)
    what = f"{'TRACT' if method == 'Tract' else 'teacher'} update of {name}, batch {NETS[name][-1]}, beside"
    return [
        compared(f"{what} {other}", found["ours"], found[other], goal)
        if other in found
        else alone(f"{what} {other}", found["ours"], f"{other} could not be run here")
        for other in others
    ]


def main() -> None:
    """Measures the chosen networks."""
    parser = parser_of(__doc__, rounds=6)
    parser.add_argument("--net", choices=[*NETS, "all"], default="all")
    parser.add_argument("--method", choices=[*METHODS, "all"], default="all")
    parser.add_argument("--serve", choices=[*METHODS, "gradient"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        use_cpu_devices(options.devices)
        keep_compiled()
        return serve(ours(options.net, options.serve))
    nets = NETS if options.net == "all" else [options.net]
    methods = METHODS if options.method == "all" else [options.method]
    chosen = [(name, method) for name in nets for method in methods if (name, method) not in SELDOM or len(nets) == 1]
    report([verdict for name, method in chosen for verdict in measure(name, method, options)], options.out)


if __name__ == "__main__":
    main()
