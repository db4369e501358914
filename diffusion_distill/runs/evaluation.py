"""Measuring images against reference images."""

from __future__ import annotations

import numpy as np

from diffusion_distill.metrics import frechet_distance, moments, pixel_features, precision_recall


def evaluate(images: np.ndarray, reference: np.ndarray, k: int = 3) -> dict[str, float]:
    """Pixel Fréchet distance, precision and recall of images against reference images (both in [-1, 1]).

    These see means, covariances and neighbourhoods of pixels, not what people see.
    """
    features, real = pixel_features(images), pixel_features(reference)
    distance = frechet_distance(moments(features), moments(real))
    precision, recall = precision_recall(real, features, k=k)
    return {"frechet": float(distance), "precision": float(precision), "recall": float(recall)}
