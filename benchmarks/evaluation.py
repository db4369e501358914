"""Features per second of InceptionV3 and the Fréchet distance's time, beside the pytorch-fid package in the same run.

    pip install torch pytorch-fid        (the extra [bench])
    python benchmarks/evaluation.py [--devices 2] [--images 16] [--batch 8]

No weights are downloaded: both get the same random ones. pytorch-fid reads them as the file it would download, which is
written under its name into torch's cache folder, TORCH_HOME, a temporary one here. Without the packages only our
side is timed.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_distill.evaluation import frechet_distance, moments
from diffusion_distill.evaluation.features import Inception
from diffusion_distill.evaluation.inception_network import SIZE, InceptionV3
from diffusion_distill.training.sharding import use_cpu_devices
from diffusion_distill.weights import inception

FILE = "pt_inception-2015-12-05-6726825d.pth"


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The fastest of some rounds, after one that compiles."""
    found = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def ours(params: Any, images: np.ndarray, batch: int) -> Callable[[], np.ndarray]:
    """Our pool3 features, batch by batch."""
    network = Inception(jax.device_put(params))
    parts = [images[begin : begin + batch] for begin in range(0, len(images), batch)]
    return lambda: np.concatenate([np.asarray(network(part).pool3) for part in parts])


def random_file(folder: Path) -> Path:
    """A file of random weights in pytorch-fid's layout, written by torch itself.

    Raises:
      ImportError: torch is not installed.
    """
    import torch  # type: ignore[import-not-found]

    torch.manual_seed(0)
    layout, state = inception.LAYOUTS["pytorch_fid"], {}
    for path, shape in inception.shapes().items():
        axes = layout.axes.get(len(shape), tuple(range(len(shape))))
        size = [shape[axes.index(axis)] for axis in range(len(shape))]
        if len(size) > 1:
            value = torch.randn(size) * (2 / math.prod(size[1:])) ** 0.5
        else:
            value = torch.ones(size) if path.endswith(("bn/weight", "running_var")) else torch.zeros(size)
        state[layout.name(path)] = value
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / FILE)
    return folder / FILE


def theirs(images: np.ndarray, batch: int) -> Callable[[], np.ndarray]:
    """pytorch-fid's pool3 features, of the file in torch's cache folder.

    Raises:
      ImportError: torch or pytorch-fid is not installed.
    """
    import torch  # type: ignore[import-not-found]
    from pytorch_fid.inception import InceptionV3  # type: ignore[import-not-found]

    network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    parts = [torch.from_numpy(images[k : k + batch]).permute(0, 3, 1, 2) / 255 for k in range(0, len(images), batch)]

    def run() -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([network(part)[0].squeeze(3).squeeze(2).numpy() for part in parts])

    return run


def compare_features(images: np.ndarray, batch: int) -> None:
    """Prints features per second of both, their ratio, and how far the features are apart."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["TORCH_HOME"] = home
        try:
            params = inception.read(random_file(Path(home) / "hub" / "checkpoints")).params
            other = theirs(images, batch)
        except ImportError as error:
            print(f"pytorch-fid is not timed: {error}")
            params, other = (
                InceptionV3().init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))["params"],
                None,
            )
    own = ours(params, images, batch)
    rate = len(images) / seconds(own)
    print(f"InceptionV3, batch {batch}: {rate:.2f} images/s")
    if other is not None:
        peer = len(images) / seconds(other)
        apart = np.abs(own() - other()).max()
        print(
            f"pytorch-fid: {peer:.2f} images/s; ours / theirs {rate / peer:.2f}; features differ by at most {apart:.1e}"
        )


def compare_frechet(width: int, count: int) -> None:
    """Prints the seconds of a Fréchet distance of full rank, and pytorch-fid's, its square root by SciPy."""
    rng = np.random.default_rng(0)
    a, b = (moments(rng.standard_normal((count, width)) @ np.diag(rng.uniform(0.1, 1, width))) for _ in range(2))
    begun = time.perf_counter()
    distance = frechet_distance(a, b)
    own = time.perf_counter() - begun
    print(f"Fréchet distance, width {width}: {own:.2f} s")
    try:
        from pytorch_fid.fid_score import calculate_frechet_distance  # type: ignore[import-not-found]
    except ImportError:
        return
    begun = time.perf_counter()
    other = calculate_frechet_distance(a.mean, a.cov, b.mean, b.cov)
    peer = time.perf_counter() - begun
    print(f"pytorch-fid: {peer:.2f} s; ours / theirs {own / peer:.2f}; they differ by {abs(distance - other):.1e}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048, help="of the features of the Fréchet distance")
    arguments = parser.parse_args()
    use_cpu_devices(arguments.devices)
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, 32, 32, 3), np.uint8)
    compare_features(images, arguments.batch)
    compare_frechet(arguments.width, arguments.width + 1000)


if __name__ == "__main__":
    main()
