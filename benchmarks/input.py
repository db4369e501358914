"""Does the input keep up with training? Batches beside the time in which a network's gradient could use them.

    python benchmarks/input.py [--devices 2] [--rounds 5] [--net demo] [--out FILE.json]

A step takes at least the time of its network's gradient, so input that is faster than the gradient limits no step. The
sources: arrays in memory, small JPEGs and photographs read on demand from zips that are written here; one thread reads.
The first lines run the gradient on one batch that is always there and on batches that are prefetched while it runs:
what the input costs where both share the machine. All run in turn.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from _nets import NETS, model_of
from _options import parser_of
from _rounds import by_turns
from _updates import passes
from _verdicts import Verdict, bounded, compared, milliseconds, report
from PIL import Image

from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.data import Batches, folder, from_arrays, prefetch
from diffusion_distill.training.sharding import data_mesh, put_batch, use_cpu_devices

MANY = 10**9  # steps: more than are asked for
CALLS = 5  # in a turn
FED = ("demo", "cifar64")  # a larger network on the same images waits even less
SLOWEST = "cifar64"  # whose gradient the sources are compared with
LOSS = 0.95  # the least share of its speed that the gradient should keep while batches are prefetched


def blocks(number: int, side: int) -> np.ndarray:
    """Images [number, side, side, 3] of coarse blocks: JPEG takes about as long for them as for photographs."""
    coarse = np.random.default_rng(0).integers(0, 256, (number, -(-side // 8), -(-side // 8), 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side]


def jpegs(path: Path, number: int, side: int) -> Path:
    """A zip of so many JPEGs of side x side."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(blocks(number, side)):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "jpeg", quality=90)
            archive.writestr(f"{i:05}.jpg", stream.getvalue())
    return path


def sources(place: Path) -> dict[str, Batches]:
    """Batches of every kind of source."""
    memory = from_arrays(blocks(20_000, 32))
    small = folder(jpegs(place / "small.zip", 4000, 32), memory=0)
    large = folder(jpegs(place / "large.zip", 200, 400), size=64, memory=0)
    return {
        "32x32 in memory": Batches(memory, 256, seed=0),
        "32x32 in memory, flipped": Batches(memory, 256, seed=0, flip=True),
        "32x32 JPEG on demand, flipped": Batches(small, 128, seed=0, flip=True),
        "400x400 JPEG to 64x64 on demand, flipped": Batches(large, 128, seed=0, flip=True),
    }


def gradient_of(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    """A function that computes the gradient of the network called `name` on a batch and waits for it."""
    gradient, mesh = passes(model_of(name), NETS[name][-1])["gradient"], data_mesh()
    return lambda batch: gradient(put_batch({"x": batch["x"]}, mesh)["x"])


def measure_together(name: str, rounds: int) -> Verdict:
    """How fast a gradient is while batches are prefetched."""
    _, (height, width, channels), batch_size = NETS[name]
    batches = Batches(from_arrays(blocks(2_000, height)[..., :channels]), batch_size, seed=0, flip=True)
    gradient, first = gradient_of(name), batches.at(0)
    with closing(prefetch(batches, 0, MANY)) as stream:
        works = {"alone": lambda: gradient(first), "fed": lambda: gradient(next(stream))}
        found = by_turns(works, rounds, CALLS)
    question = f"gradient of {name}, {height}x{width}, batch {batch_size}, on prefetched batches beside a batch there"
    return compared(question, found["fed"], found["alone"], LOSS)


def measure_sources(rounds: int) -> list[Verdict]:
    """How fast the sources are, beside the gradient of as many images."""
    _, (height, width, _), batch_size = NETS[SLOWEST]
    gradient, batch = gradient_of(SLOWEST), {"x": np.zeros((batch_size, height, width, 3), np.float32)}
    with tempfile.TemporaryDirectory() as place:
        found = sources(Path(place))
        streams = {title: map(batches.at, count()) for title, batches in found.items()}
        works = {title: partial(next, stream) for title, stream in streams.items()}
        times = by_turns({"gradient": lambda: gradient(batch), **works}, rounds, CALLS)
        return [
            bounded(
                f"{batches.batch_size} images, {title}, beside the gradient of {SLOWEST} of as many",
                milliseconds(times[title]),
                milliseconds(times["gradient"], batches.batch_size / batch_size),
            )
            for title, batches in found.items()
        ]


def main() -> None:
    """Measures the gradients and the sources."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--net", choices=FED, help="prefetch for this network only, and measure no sources")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    keep_compiled()
    found = [measure_together(name, options.rounds) for name in ([options.net] if options.net else FED)]
    report(found + ([] if options.net else measure_sources(options.rounds)), options.out)


if __name__ == "__main__":
    main()
