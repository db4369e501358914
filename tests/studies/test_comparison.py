"""Solvers compared: sets of samples are measured as evaluations measure them, and nothing is held whole."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conventions import write_reference

from diffusion_distill import api
from diffusion_distill.api.fitting import FitSettings
from diffusion_distill.data.quantise import quantise
from diffusion_distill.evaluation import frechet_distance, moments, precision_recall
from diffusion_distill.evaluation.features import Pixels
from diffusion_distill.evaluation.measuring import EvaluationSettings, published_reference
from diffusion_distill.solvers.spec import SamplerSpec
from diffusion_distill.studies import comparison as comparison_run
from diffusion_distill.studies.comparison import Comparison, Setting, compare_solvers
from diffusion_distill.training.artefact import Artefact

SHAPE = (2, 2, 1)
PIXELS = Pixels(SHAPE)


class InPieces:
    """A source that gives no more than ten images at once."""

    shape, num_classes = SHAPE, 0

    def __init__(self) -> None:
        self.images = np.random.default_rng(0).uniform(-1, 1, (40, *SHAPE)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        assert len(indices) <= 10, "a whole set may be too large"
        return {"x": self.images[indices]}


def test_a_comparison_measures_several_sets_batch_by_batch(
    teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, setting = InPieces(), Setting(teacher, 24, batch_size=10, seed=3)
    monkeypatch.setattr(comparison_run, "EvaluationSettings", partial(EvaluationSettings, kept=16))
    comparison = Comparison(("ddim",), (2,), fit=False, truth_steps=8, repetitions=2)
    said: list[str] = []
    [row] = compare_solvers(setting, comparison, FitSettings(), source, tmp_path, said.append)
    drawn, kept = api.sample(teacher, 48, 2, seed=3), 16
    each = [api.evaluate(images, source.images) for images in (drawn[:24], drawn[24:])]
    distances = [found["frechet"] for found in each]
    assert [found["frechet"] for found in row["repetitions"]] == distances, "to the last digit"
    first = precision_recall(*(PIXELS(quantise(images[:kept])) for images in (source.images, drawn)), k=3)
    assert (row["repetitions"][0]["precision"], row["repetitions"][0]["recall"]) == first
    assert (row["frechet"], row["frechet min"]) == (np.mean(distances), min(distances))
    assert row["frechet std"] == pytest.approx(np.std(distances, ddof=1))
    assert (row["solver"], row["steps"], row["nfe"], row["fitted"]) == ("ddim", 2, 2, False)
    truth = api.sample(teacher, kept, 8, solver="dpm_solver++ order=2", seed=3)
    assert row["error"] == pytest.approx(np.sqrt(np.mean((drawn[:kept] - truth) ** 2)), rel=1e-4)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["reference images"] == 40 and results["repetitions"] == 2 and results["rows"] == [row]
    assert results["features"] == "pixels" and results["quantisation"] == "round_half_up" and "±" in said[0]


def test_a_comparison_with_published_statistics(teacher: Artefact, tmp_path: Path) -> None:
    rows = PIXELS(np.random.default_rng(0).integers(0, 256, (40, *SHAPE), np.uint8))
    path = write_reference(tmp_path / "published.npz", moments(rows))
    comparison = Comparison(("ddim",), (2,), fit=False, truth_steps=4)
    [row] = compare_solvers(
        Setting(teacher, 24), comparison, FitSettings(), published_reference(path), tmp_path, lambda line: None
    )
    drawn = moments(PIXELS(quantise(api.sample(teacher, 24, 2))))
    assert row["frechet"] == pytest.approx(frechet_distance(drawn, moments(rows)), rel=1e-9)
    assert "precision" not in row and (tmp_path / "quality.png").is_file()


@pytest.mark.fast
def test_a_comparison_needs_at_least_one_set() -> None:
    with pytest.raises(ValueError, match="repetitions must be a whole number of at least 1, got 0"):
        Comparison(repetitions=0)


def test_classifiers_that_guide_are_told_apart(teacher: Artefact) -> None:
    """A comparison that was begun with one classifier does not go on with another."""

    def facts(weight: float) -> dict[str, object]:
        classifier = jax.tree_util.Partial(lambda weight, z, level, cond: weight * z.sum((1, 2, 3)), np.float32(weight))
        return Setting(teacher, 8, spec=SamplerSpec(guidance={"scale": 1.0, "classifier": classifier})).facts()

    assert facts(1.0) == facts(1.0) != facts(2.0)
