"""How time and memory grow: with width, pixels, batch and steps, beside the operations and the arrays that are needed.

    python benchmarks/growth.py [--devices 2] [--rounds 5] [--quick] [--out FILE.json] [--picture FILE.png]

Small networks are timed over a range of sizes, all in turn. A straight line through the logarithms of sizes and times
gives the factor by which twice the size lengthens the time. It should be no more than the factor of the operations
(FLOPs counted from the shapes): about 4 for a TRACT update at twice the width, 2 for twice the pixels, images or
sampling steps, and 1 for twice the steps T of TRACT's schedule, on which an update does not depend.

An update's memory is what the compiled program needs on each device: arguments, results and temporaries. What lives
at once there is the state (parameters, optimizer, averages, teacher), the batch, the gradient, and the values that
JAX's differentiation of the network keeps for it; a compiler may need less by computing some again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _device_common import random_params
from _nets import NETS
from _options import parser_of
from _rounds import by_turns
from _updates import images, update_of, updates
from _verdicts import Spread, Verdict, bounded, report

from diffusion_distill import Model, Tract, UNet, table_for
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.process.levels import Level
from diffusion_distill.report.figures import figure_of
from diffusion_distill.solvers import engine
from diffusion_distill.training import utilisation
from diffusion_distill.training.sharding import data_mesh, put_batch, replicated, use_cpu_devices

#: Where one size grows, the others are these.
BASE = {"width": 32, "pixels": 8**2, "batch": 32, "T": 1024}
GROWING = {
    "width": (32, 64, 96),
    "pixels": (8**2, 16**2, 24**2),
    "batch": (16, 32, 64, 128),
    "T": (64, 1024, 4096),
}
SAMPLING = (4, 8, 16, 32)  # steps
CALLS = 2  # in a turn
GOAL = 0.9  # twice the size may cost a tenth more than its operations do
MB = 1e6
NEEDED = "needed: growth of the operations, or bytes that live at once"
TALL = 4.0  # a picture's vertical axis spans at least this factor, so that noise looks small


@dataclass(frozen=True)
class Growth:
    """Costs over a range of sizes.

    Attributes:
      what: costs, of growing which size.
      sizes: [sizes].
      costs: [calls, sizes], in milliseconds or MB.
      needed: [sizes], in units of its own for times, where only its growth matters.
      unit: of the costs.
    """

    what: str
    size: str
    sizes: Sequence[int]
    costs: np.ndarray
    needed: np.ndarray
    unit: str = "ms"

    def doubling(self, costs: np.ndarray) -> float:
        """The factor of the costs [sizes] where the size is doubled, from the line through their logarithms."""
        return float(2 ** np.polyfit(np.log(self.sizes), np.log(costs), 1)[0])

    @property
    def verdict(self) -> Verdict:
        """Times by their growth, memory by what is needed at the largest size."""
        if self.unit == "MB":
            [*_, cost], [*_, needed], [*_, size] = self.costs[0], self.needed, self.sizes
            question = f"memory of a {self.what}, {self.size} {size}, beside what lives at once"
            return bounded(question, (cost, cost, cost), needed, 1.0, "MB")
        low, median, high = statistics.quantiles([self.doubling(costs) for costs in self.costs], n=4)
        found: Spread = (low, median, high)
        question = f"time of a {self.what} at twice the {self.size}, beside its operations"
        return bounded(question, found, self.doubling(self.needed), GOAL, "times")

    def draw(self, axes: Any) -> None:
        """What was measured, the straight line through it, and what is needed, on logarithmic axes."""
        from matplotlib.ticker import LogLocator, NullLocator

        middle = np.median(self.costs, axis=0)
        logarithms = np.log(self.sizes), np.log(middle)
        line = np.exp(np.polyval(np.polyfit(*logarithms, 1), logarithms[0]))
        memory = self.unit == "MB"
        needed = self.needed * (1.0 if memory else np.exp(np.mean(logarithms[1] - np.log(self.needed))))
        axes.plot(self.sizes, needed, color="C1", linewidth=3, alpha=0.5, label=NEEDED)
        axes.plot(self.sizes, line, color="C0", linestyle="--", label="straight line through it")
        axes.plot(self.sizes, middle, color="C0", linestyle="", marker="o", label="measured")
        axes.set(xscale="log", yscale="log", xlabel=self.size, ylabel=self.unit)
        axes.set_xticks(self.sizes, [str(size) for size in self.sizes], minor=False)
        axes.set_xticks([], minor=True)
        low, high = min(*middle, *needed), max(*middle, *needed)
        room = max(1.15, (TALL * low / high) ** 0.5)
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        what = f"{'memory' if memory else 'time'} of a {self.what}"
        factors = f"twice the {self.size}: x {self.doubling(middle):.2f} (needed {self.doubling(self.needed):.2f})"
        axes.set_title(f"{what}\n{factors}", fontsize=8.5, loc="left")


def picture(rows: Sequence[Sequence[Growth]], path: Path) -> None:
    """Draws every growth."""
    figure, axes = figure_of([len(row) for row in rows], (12.6, 6.2))
    for place, growth in zip(axes, [growth for row in rows for growth in row], strict=True):
        growth.draw(place)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


@dataclass(frozen=True)
class Point:
    """A TRACT update of some size.

    Attributes:
      update: makes one.
      flops: of the whole batch.
      memory, needed: bytes on each device: those of the program, and those that live at once.
    """

    update: Callable[[], object]
    flops: float
    memory: int
    needed: int


@cache
def point(width: int, pixels: int, batch: int, T: int) -> Point:
    """Compiles an update of the demo's network at some width."""
    model, method = model_at(width, pixels), Tract((T, 1), length="1M")
    params = jax.eval_shape(model.init, jax.random.key(0))
    begin, step, others = update_of(model, method, batch)
    state, devices = jax.eval_shape(begin, params), jax.device_count()
    compiled = step.lower(state, *others).compile()
    used = compiled.memory_analysis()
    memory = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    split = bytes_of(images(model, batch)) + kept(model, params, batch)
    return Point(
        update=updates(model, begin, compiled, others),
        flops=batch * utilisation.update_flops(method.losses, model, model, state, others[1].rows),
        memory=memory + used.temp_size_in_bytes,
        needed=bytes_of(state) + bytes_of(params) + split // devices,
    )


def model_at(width: int, pixels: int) -> Model:
    """The demo's network at another width, for images of so many pixels."""
    settings, (*_, channels), _ = NETS["demo"]
    side = round(pixels**0.5)
    network = UNet(**{**settings, "ch": width, "emb_ch": 2 * width})
    return Model(network, (side, side, channels), prediction="v")


def bytes_of(tree: Any) -> int:
    """Of all arrays of a tree, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept(model: Model, params: Any, batch: int) -> int:
    """Bytes that JAX's differentiation of the network keeps from the forward pass, beside its arguments."""
    found = []

    def forward(params: Any, z: Any, level: Level) -> None:
        _, backward = jax.vjp(lambda params: model.raw(params, z, level, None, None), params)
        given = {id(leaf) for leaf in jax.tree.leaves((params, z, level))}
        values = {id(leaf): leaf for leaf in jax.tree.leaves(backward)}
        found.append(bytes_of([leaf for name, leaf in values.items() if name not in given]))

    level = Level(*(jax.ShapeDtypeStruct((batch,), jnp.float32),) * 2)
    jax.eval_shape(forward, params, jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32), level)
    return found[0]


def update_growths(size: str, sizes: Sequence[int], rounds: int) -> list[Growth]:
    """Time and memory of updates over a range of one of the sizes of `BASE`."""
    points = {value: point(**{**BASE, size: value}) for value in sizes}
    costs = costs_of({value: found.update for value, found in points.items()}, rounds)
    of = lambda name: np.array([getattr(found, name) for found in points.values()], float)  # noqa: E731
    time = Growth("TRACT update", size, sizes, costs, of("flops"))
    return [time, Growth("TRACT update", size, sizes, of("memory")[None] / MB, of("needed") / MB, "MB")]


def sampling_growth(sizes: Sequence[int], rounds: int) -> Growth:
    """Time of drawing a batch with DDIM over its number of steps."""
    model, mesh = model_at(BASE["width"], BASE["pixels"]), data_mesh()
    denoise = jax.device_put(model.denoiser(random_params(model)), replicated(mesh))
    start = put_batch({"z": images(model, BASE["batch"])}, mesh)["z"]
    tables = {steps: table_for(model, steps) for steps in sizes}
    draw = lambda table: jax.block_until_ready(engine.integrate(denoise, table, start))  # noqa: E731
    costs = costs_of({steps: lambda table=table: draw(table) for steps, table in tables.items()}, rounds)
    return Growth("DDIM sample", "steps", sizes, costs, np.array(sizes, float))


def costs_of(works: Mapping[int, Callable[[], object]], rounds: int) -> np.ndarray:
    """Milliseconds [calls, sizes], in turn."""
    found = by_turns({str(size): work for size, work in works.items()}, rounds, CALLS)
    return 1000 * np.array([times.seconds for times in found.values()]).T


def measured(quick: bool, rounds: int) -> tuple[list[Growth], list[Growth]]:
    """The growths of times, and of memory."""
    times, memory = [], []
    for size, sizes in GROWING.items():
        print(f"an update over its {size}", flush=True)
        time, space = update_growths(size, sizes[:2] if quick else sizes, rounds)
        times.append(time)
        memory += [space] if size != "T" else []
    return [*times, sampling_growth(SAMPLING[:2] if quick else SAMPLING, rounds)], memory


def main() -> None:
    """Measures, and draws if asked to."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--quick", action="store_true", help="two sizes of each, to see that it works")
    parser.add_argument("--picture", type=Path, help="a picture of the growth")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    keep_compiled()
    times, memory = measured(options.quick, options.rounds)
    report([growth.verdict for growth in times + memory], options.out)
    if options.picture:
        *updating, sampling = times
        picture([updating, [sampling, *memory]], options.picture)


if __name__ == "__main__":
    main()
