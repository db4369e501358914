"""InceptionV3's features and the Fréchet distance, beside published programs in the same run.

    python benchmarks/evaluation.py [--devices 2] [--batch 8] [--question features] [--rounds 8] [--out FILE.json]

The features are those of pytorch-fid, of the same 8-bit images, resize included, with random weights on both sides; as
many threads as we have devices. The Fréchet distance is of two given means and covariances, of more images than
features and of fewer, beside pytorch-fid's, whose square root is SciPy's, and torch-fidelity's, which sums the roots of
eigenvalues. The peers need the extra [bench], in this environment or in the Python that the variable PEER_PYTHON names.
A ratio above 1 means that ours is ahead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from unittest import mock

import numpy as np
from _options import parser_of
from _rounds import in_turn, serve
from _verdicts import Verdict, alone, compared, report

Work = Callable[[], object]

#: Questions and whom they are asked beside.
PEERS = {
    "features": ("pytorch-fid",),
    "full rank": ("pytorch-fid", "torch-fidelity"),
    "singular": ("pytorch-fid", "torch-fidelity"),
}
SECONDS = 40.0  # of a question, after which no further round is begun


def images(batch: int) -> np.ndarray:
    """Random 8-bit images of CIFAR-10's size."""
    return np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)


def statistics(question: str, width: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(images, mean, covariance) of two sets of random features."""
    count, rng = width + 1000 if question == "full rank" else width // 2, np.random.default_rng(0)
    sets = [rng.standard_normal((count, width)) * rng.uniform(0.1, 1, width) for _ in range(2)]
    return [(count, features.mean(axis=0), np.cov(features, rowvar=False)) for features in sets]


def our_features(options: argparse.Namespace) -> Work:
    """One batch through our network, on all devices."""
    import jax

    from diffusion_distill.base.compilation import keep_compiled
    from diffusion_distill.evaluation.features import Inception
    from diffusion_distill.evaluation.inception_network import SIZE, InceptionV3
    from diffusion_distill.training.sharding import data_mesh, replicated, use_cpu_devices

    use_cpu_devices(options.devices)
    keep_compiled()
    params = InceptionV3().init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))["params"]
    network, batch = Inception(jax.device_put(params, replicated(data_mesh()))), images(options.batch)
    return lambda: np.asarray(network(batch).pool3)


def their_features(options: argparse.Namespace) -> Work:
    """One batch through pytorch-fid's network, which keeps the weights it was made with instead of loading any."""
    import torch  # type: ignore[import-not-found]
    from pytorch_fid import inception  # type: ignore[import-not-found]

    torch.set_num_threads(options.devices)
    nothing = mock.patch.object(torch.nn.Module, "load_state_dict")
    with mock.patch.object(inception, "load_state_dict_from_url"), nothing:
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    batch = torch.from_numpy(images(options.batch)).permute(0, 3, 1, 2)

    def work() -> np.ndarray:
        with torch.inference_mode():
            return network(batch / 255)[0].numpy()

    return work


def our_distance(options: argparse.Namespace) -> Work:
    """Our Fréchet distance of moments that nothing is known of yet."""
    from diffusion_distill.evaluation import Moments, frechet_distance

    sets = statistics(options.question, options.width)
    return lambda: frechet_distance(*(Moments(*known) for known in sets))


def their_distance(options: argparse.Namespace) -> Work:
    """The distance of the package that is asked for."""
    (_, mean, cov), (_, other_mean, other_cov) = statistics(options.question, options.width)
    if options.serve == "pytorch-fid":
        from pytorch_fid.fid_score import calculate_frechet_distance  # type: ignore[import-not-found]

        return lambda: calculate_frechet_distance(mean, cov, other_mean, other_cov)
    from torch_fidelity.metric_fid import fid_statistics_to_metric  # type: ignore[import-not-found]

    first, second = {"mu": mean, "sigma": cov}, {"mu": other_mean, "sigma": other_cov}
    return lambda: fid_statistics_to_metric(first, second, verbose=False)


def measure(question: str, options: argparse.Namespace) -> list[Verdict]:
    """Times of one question, beside each peer that is installed."""
    peer, own = os.environ.get("PEER_PYTHON", sys.executable), [__file__, "--question", question]
    for name in ("devices", "batch", "width"):
        own += [f"--{name}", str(getattr(options, name))]
    workers = {who: [peer, *own, "--serve", who] for who in PEERS[question]}
    found = in_turn({"ours": [sys.executable, *own, "--serve", "ours"], **workers}, options.rounds, 1, seconds=SECONDS)
    what = f"Fréchet distance of {options.width} features, {question}"
    if question == "features":
        what = f"Inception features of {options.batch} images, {options.devices} devices"
    return [
        compared(f"{what}, beside {who}", found["ours"], found[who])
        if who in found
        else alone(f"{what}, beside {who}", found["ours"], f"{who} could not be run here")
        for who in workers
    ]


def main() -> None:
    """Measures the chosen questions."""
    parser = parser_of(__doc__, rounds=8)
    parser.add_argument("--batch", type=int, default=8, help="images whose features are taken at once")
    parser.add_argument("--width", type=int, default=2048, help="of the features of the Fréchet distance")
    parser.add_argument("--question", choices=[*PEERS, "all"], default="all")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        ours = options.serve == "ours"
        features, distance = (our_features, our_distance) if ours else (their_features, their_distance)
        return serve((features if options.question == "features" else distance)(options))
    questions = PEERS if options.question == "all" else [options.question]
    report([verdict for question in questions for verdict in measure(question, options)], options.out)


if __name__ == "__main__":
    main()
