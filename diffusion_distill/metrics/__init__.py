"""Metrics on feature arrays [n, width]: Fréchet distance, precision and recall."""

from diffusion_distill.metrics.features import pixel_features
from diffusion_distill.metrics.frechet import Moments, frechet_distance, merge, moments
from diffusion_distill.metrics.precision_recall import PrecisionRecall, memberships, precision_recall

__all__ = [
    "Moments",
    "PrecisionRecall",
    "frechet_distance",
    "memberships",
    "merge",
    "moments",
    "pixel_features",
    "precision_recall",
]
