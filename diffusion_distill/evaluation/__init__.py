"""Metrics on feature arrays [n, width], their statistics in batches, and reference statistics on disk."""

from diffusion_distill.evaluation.frechet import (
    FrechetTerms,
    Moments,
    extrapolated,
    frechet_distance,
    frechet_terms,
    merge,
    moments,
)
from diffusion_distill.evaluation.inception_score import InceptionScore, ScoreSums, inception_score
from diffusion_distill.evaluation.kid import Kid, kid, random_subsets
from diffusion_distill.evaluation.pixels import pixel_features
from diffusion_distill.evaluation.precision_recall import PrecisionRecall, memberships, precision_recall
from diffusion_distill.evaluation.references import Reference, read_reference
from diffusion_distill.evaluation.statistics import Accumulator, Blocks

__all__ = [
    "Accumulator",
    "Blocks",
    "FrechetTerms",
    "InceptionScore",
    "Kid",
    "Moments",
    "PrecisionRecall",
    "Reference",
    "ScoreSums",
    "extrapolated",
    "frechet_distance",
    "frechet_terms",
    "inception_score",
    "kid",
    "memberships",
    "merge",
    "moments",
    "pixel_features",
    "precision_recall",
    "random_subsets",
    "read_reference",
]
