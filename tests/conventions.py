"""What other programs do with metrics and write into files of references, for comparisons with their numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.files import user_path
from diffusion_distill.evaluation import Moments
from diffusion_distill.evaluation.kid import Subset


def population(of: Moments) -> Moments:
    """Moments with divisor n, as in StyleGAN3's metrics; use them for distances, not in `merge`."""
    assert of.count is not None
    share = 1 - 1 / of.count
    centred = None if of.centred is None else of.centred * np.sqrt(share)
    return replace(of, cov=of.cov * share, centred=centred)


def frechet_bias(variances: ArrayLike, n: float, m: float = np.inf) -> float:
    """The mean Fréchet distance between two sets drawn from the same distribution, to first order in 1/n.

        (1/n + 1/m) (sum l_i + (sum_{i != j} l_i l_j / (l_i + l_j) + sum l_i) / 2)

    For a Gaussian with eigenvalues l_i (`variances`, all positive) of its covariance, sets of n and of m images; an
    exactly known reference has m infinite. About (1/n + 1/m) width^2 / 4 for unit variances.
    """
    variances = np.asarray(variances, np.float64)
    pairs = variances[:, None] * variances / (variances[:, None] + variances)
    across = pairs.sum() - pairs.trace()
    return float((1 / n + 1 / m) * (variances.sum() + (across + variances.sum()) / 2))


def consecutive_blocks(n: int, m: int, largest: int = 1024) -> list[Subset]:
    """Blocks of consecutive rows of n and of m as TF-GAN cuts them.

    There are ceil(max(n, m) / largest) blocks of nearly equal size, the larger ones last.

    Raises:
        ValueError: arguments below 1, or fewer images than blocks.
    """
    blocks = -(-max(positive_int("n", n), positive_int("m", m)) // positive_int("largest", largest))
    if min(n, m) < blocks:
        raise ValueError(
            f"A set has {min(n, m)} images for {blocks} blocks. Use sets of similar size or larger blocks."
        )
    return list(zip(_cut(n, blocks), _cut(m, blocks), strict=True))


def _cut(count: int, blocks: int) -> list[NDArray[np.integer]]:
    """The rows 0..count - 1 in consecutive blocks, the larger ones last."""
    size, larger = divmod(count, blocks)
    sizes = [size] * (blocks - larger) + [size + 1] * larger
    return np.split(np.arange(count), np.cumsum(sizes)[:-1])


def write_reference(path: str | Path, of: Moments | None = None, facts: Any = None, **arrays: ArrayLike) -> Path:
    """Writes an .npz of reference statistics.

    Args:
        of: as mu and sigma (EDM, pytorch-fid).
        facts: what the statistics are of, JSON-ready; `images` is filled in from the moments.
        arrays: others by their names in the table of `evaluation.references`: mu_s and sigma_s, pool_3, arr_0, arr_1.
    """
    path = user_path(path)
    if of is not None:
        arrays |= {"mu": of.mean, "sigma": of.cov}
    np.savez(path, **arrays, meta=np.asarray(json.dumps(_facts(of, facts))))  # type: ignore[arg-type]
    return path


def write_tract(stem: str | Path, of: Moments, facts: Any = None) -> tuple[Path, Path]:
    """Writes STEM_mean.npy and STEM_std.npy, the latter the covariance as TRACT reads it, and what they are of."""
    mean, cov = (user_path(f"{stem}_{part}.npy") for part in ("mean", "std"))
    np.save(mean, of.mean)
    np.save(cov, of.cov)
    mean.with_name(f"{mean.name}.facts.json").write_text(json.dumps(_facts(of, facts)))
    return mean, cov


def _facts(of: Moments | None, facts: Any) -> dict[str, Any]:
    return {**({"images": of.count} if of is not None and of.count else {}), **(facts or {})}
