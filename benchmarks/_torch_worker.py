"""A worker of `steps.py`: PyTorch's TRACT update. It runs in any Python that has PyTorch, and needs nothing of ours.

    python benchmarks/_torch_worker.py NETWORK --threads 2 [--compiled]

NETWORK is JSON: [settings of the U-Net, shape of an image, batch size].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from _rounds import serve
from _torch_peer import Tract, UNet


def tract(settings: dict[str, Any], image: list[int], batch: int, compiled: bool) -> Callable[[], object]:
    """The update, on a schedule of 32 steps."""
    angle = np.linspace(0.01, 0.99, 33)[::-1] * np.pi / 2
    alpha, sigma = np.cos(angle), np.sin(angle)
    decay = sigma[1:] / sigma[:-1]
    rows = {"time_t": 1000 * angle[:-1], "alpha_t": alpha[:-1], "sigma_t": sigma[:-1]}
    rows |= {"time_m": 1000 * angle[1:], "alpha_m": alpha[1:], "sigma_m": sigma[1:]}
    rows |= {"r": decay, "d": alpha[1:] - alpha[:-1] * decay, "first": np.full(32, 0.3), "second": np.full(32, 0.7)}
    update = Tract(lambda: UNet(image[-1], size=image[0], **settings), rows, compiled=compiled)
    x = torch.rand(batch, image[-1], *image[:2]).to(memory_format=torch.channels_last)
    return lambda: float(update(x))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=json.loads)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    serve(tract(*options.network, compiled=options.compiled))
