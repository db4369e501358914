"""TRACT's update with low-rank adapters of each rank, beside that of the whole student, in turn; and their states.

    python benchmarks/low_rank.py [--devices 2] [--net demo] [--rounds 6] [--out FILE.json]

A ratio above 1 means that the adapters' update is faster. Merging them costs products of each kernel in every role, and
the gradient of a kernel is computed whole before it becomes the adapters'; Adam and the averages have less to do.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from _device_common import random_params
from _nets import NETS, model_of
from _options import parser_of
from _rounds import by_turns
from _updates import update_of, updates
from _verdicts import compared, report

from diffusion_distill import OptimizerSettings, Tract
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.base.typing import Params
from diffusion_distill.training import low_rank
from diffusion_distill.training.optimizers import make_optimizer
from diffusion_distill.training.sharding import use_cpu_devices
from diffusion_distill.training.state import TrainState, create

RANKS = (4, 16, 64)


def adapted(rank: int, method: Tract) -> Callable[[Params], TrainState]:
    """What makes the first state of adapters of a rank from a network's parameters."""

    def begin(params: Params) -> TrainState:
        adapters = low_rank.init(jax.random.key(1), params, rank)
        return create(adapters, make_optimizer(OptimizerSettings()), method.averages, adapters, base=params)

    return begin


def main() -> None:
    """Times the updates of one network."""
    parser = parser_of(__doc__, rounds=6)
    parser.add_argument("--net", choices=NETS, default="demo")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    keep_compiled()
    model, method = model_of(options.net), Tract((32, 1))
    whole, step, others = update_of(model, method, NETS[options.net][-1])
    begins = {"whole": whole} | {f"rank {rank}": adapted(rank, method) for rank in RANKS}
    works = {}
    for name, begin in begins.items():
        arrays = jax.tree.leaves(jax.eval_shape(begin, random_params(model)))
        size = sum(array.size * array.dtype.itemsize for array in arrays)
        works[f"{name}, a state of {size / 1e6:.1f} MB"] = updates(model, begin, step, others)
    found = by_turns(works, options.rounds)
    base, *names = works
    report([compared(f"{name}, beside {base}", found[name], found[base]) for name in names], options.out)


if __name__ == "__main__":
    main()
