"""Images per second of the input, beside the rate at which a training step could use them.

    python benchmarks/input.py [--devices 2] [--seconds 2]

A step takes at least the time of its network's gradient, so input that is faster than the gradient limits no
step. Sources: arrays in memory, small JPEGs and photographs read on demand from zips that are written here.
The first lines run the gradient on one batch that is always there and on batches that are prefetched while it
runs: what the input costs where both share the machine.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _nets import NETS
from PIL import Image

from diffusion_distill.data import Batches, folder, from_arrays, prefetch
from diffusion_distill.networks import UNet
from diffusion_distill.training.sharding import data_mesh, put_batch, replicated, use_cpu_devices

MANY = 10**9  # steps: more than the time allows


def blocks(count: int, side: int) -> np.ndarray:
    """Images [count, side, side, 3] of coarse blocks: JPEG takes about as long for them as for photographs."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, -(-side // 8), -(-side // 8), 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side]


def jpegs(path: Path, count: int, side: int) -> Path:
    """A zip of `count` JPEGs of side x side."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(blocks(count, side)):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "jpeg", quality=90)
            archive.writestr(f"{i:05}.jpg", stream.getvalue())
    return path


def rate(batches: Iterator[Any], batch_size: int, seconds: float, use: Callable[[Any], object] = id) -> float:
    """Images per second of taking batches and using them, the first three excluded."""
    for _ in range(3):
        use(next(batches))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        use(next(batches))
        count += batch_size
    return count / (time.perf_counter() - start)


def gradient_of(name: str) -> Callable[[Any], object]:
    """A function that computes the gradient of the network called `name` on a batch and waits for it."""
    settings, image, batch_size = NETS[name]
    mesh, network = data_mesh(), UNet(**settings)
    t = np.linspace(0, 1000, batch_size, dtype=np.float32)
    params = jax.jit(network.init, out_shardings=replicated(mesh))(jax.random.key(0), np.zeros((1, *image)), t[:1])

    @jax.jit
    def gradient(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            estimate: Any = network.apply(params, batch["x"], batch["t"])
            return jnp.mean(jnp.square(estimate - batch["x"]))

        return jax.grad(loss)(params)

    return lambda batch: jax.block_until_ready(gradient(params, put_batch({"x": batch["x"], "t": t}, mesh)))


def sources(place: Path) -> dict[str, Batches]:
    """Batches of every kind of source."""
    memory = from_arrays(blocks(20_000, 32))
    small = folder(jpegs(place / "small.zip", 4000, 32), memory=0)
    large = folder(jpegs(place / "large.zip", 200, 400), size=64, memory=0)
    return {
        "32x32 in memory, batch 128": Batches(memory, 128, seed=0),
        "32x32 in memory, batch 256": Batches(memory, 256, seed=0),
        "32x32 in memory, batch 128, flipped": Batches(memory, 128, seed=0, flip=True),
        "32x32 in memory, batch 256, flipped": Batches(memory, 256, seed=0, flip=True),
        "32x32 JPEG on demand, batch 128, flipped": Batches(small, 128, seed=0, flip=True),
        "400x400 JPEG to 64x64 on demand, batch 128": Batches(large, 128, seed=0, flip=True),
    }


def measure_input(batches: Batches, seconds: float) -> tuple[float, float]:
    """Images per second of batches computed when they are asked for, and ahead."""
    direct = rate(map(batches.at, range(MANY)), batches.batch_size, seconds)
    with closing(prefetch(batches, 0, MANY)) as stream:
        return direct, rate(stream, batches.batch_size, seconds)


def measure_together(name: str, seconds: float) -> float:
    """Prints how fast the gradient of a network is alone and on prefetched batches; returns the former."""
    _, (height, width, channels), batch_size = NETS[name]
    batches = Batches(from_arrays(blocks(2_000, height)[..., :channels]), batch_size, seed=0, flip=True)
    gradient = gradient_of(name)
    alone, fed = [], []
    for _ in range(4):  # by turns, the best of each: other programs on the machine disturb both alike
        alone.append(rate(cycle([batches.at(0)]), batch_size, seconds, gradient))
        with closing(prefetch(batches, 0, MANY)) as stream:
            fed.append(rate(stream, batch_size, seconds, gradient))
    direct, _ = measure_input(batches, seconds)
    print(
        f"{name} gradient, {height}x{width}, batch {batch_size}: {max(alone):.0f} images/s alone, on prefetched batches"
        f" {max(fed):.0f} = {max(fed) / max(alone):.2f} of it; input {direct:.0f} = {direct / max(alone):.0f} times it"
    )
    return max(alone)


def main() -> None:
    """Prints the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="devices to split a CPU into")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    gradients = {name: measure_together(name, options.seconds) for name in NETS}
    with tempfile.TemporaryDirectory() as place:
        for title, batches in sources(Path(place)).items():
            direct, ahead = measure_input(batches, options.seconds)
            ratio = max(direct, ahead) / gradients["cifar64"]
            print(f"{title:44}{direct:8.0f} images/s, prefetched{ahead:8.0f}; {ratio:6.0f} times the cifar64 gradient")


if __name__ == "__main__":
    main()
