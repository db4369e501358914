"""Long evaluations: they go on where they were, to the last bit, and say what they are."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import diffusion_distill as dd
from diffusion_distill import api
from diffusion_distill.api import evaluation
from diffusion_distill.api.classifier import TrainedClassifier
from diffusion_distill.api.evaluation import evaluate_samplers, reference_of
from diffusion_distill.api.features import features_named
from diffusion_distill.api.monitor import Monitor
from diffusion_distill.api.sampling import Sampler, sampler_of
from diffusion_distill.base import interrupts
from diffusion_distill.data import folder, from_arrays
from diffusion_distill.data.quantise import quantise
from diffusion_distill.evaluation import frechet_distance, inception_score, moments, pixel_features
from diffusion_distill.evaluation.classifier_network import Classifier
from diffusion_distill.evaluation.features import FromFunction, Inception, InceptionFeatures, Pixels
from diffusion_distill.evaluation.measuring import EvaluationSettings, Part
from diffusion_distill.methods.phases import Phase
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.state import create

SHAPE = (2, 2, 1)
SETTINGS = EvaluationSettings(count=100, repetitions=2, batch_size=16, kept=60)
PIXELS = Pixels(SHAPE)


def real_images(count: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE), np.uint8)


@pytest.fixture
def reference() -> Part:
    """The features of some images."""
    return reference_of(from_arrays(real_images()), PIXELS, SETTINGS)


def samplers_of(teacher: Artefact) -> dict[str, Any]:
    return {f"ddim, {n}": partial(sampler_of, teacher, steps=n) for n in (1, 2)}


def run(teacher: Artefact, reference: Part, workdir: Path, settings: EvaluationSettings = SETTINGS) -> list[dict]:
    return evaluate_samplers(samplers_of(teacher), PIXELS, reference, settings, {"note": 1}, workdir, lambda line: None)


def test_an_evaluation_measures_what_sampling_draws(teacher: Artefact, reference: Part, tmp_path: Path) -> None:
    rows = run(teacher, reference, tmp_path)
    drawn = api.sample(teacher, 200, 2, batch_size=40)
    real = moments(pixel_features(real_images().astype(np.float32) / 127.5 - 1))
    for repetition, images in enumerate((drawn[:100], drawn[100:])):
        taken = moments(pixel_features(quantise(images).astype(np.float32) / 127.5 - 1))
        found = rows[1]["repetitions"][repetition]["frechet"]
        assert found == pytest.approx(frechet_distance(taken, real), rel=1e-4)
    row, each = rows[1], [scores["frechet"] for scores in rows[1]["repetitions"]]
    assert (row["frechet"], row["frechet min"]) == pytest.approx((np.mean(each), min(each)))
    assert row["frechet std"] == pytest.approx(np.std(each, ddof=1)) and row["nfe"] == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"] == rows and results["quantisation"] == "round_half_up" and results["features"] == "pixels"
    assert results["count"] == 100 and results["note"] == 1
    assert len(results["reference hash"]) == 16 and results["reference images"] == 90
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(
    teacher: Artefact, reference: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, draw, calls = run(teacher, reference, tmp_path / "whole"), Sampler.draw, []

    def stops(self: Sampler, *arguments: Any) -> np.ndarray:
        calls.append(arguments[0])
        if len(calls) in (3, 16):  # inside the first and inside a later repetition
            raise interrupts.Interrupted("SIGTERM")
        return draw(self, *arguments)

    monkeypatch.setattr(Sampler, "draw", stops)
    for _ in range(2):
        with pytest.raises(interrupts.Interrupted):
            run(teacher, reference, tmp_path / "stopped")
    resumed = run(teacher, reference, tmp_path / "stopped")
    assert resumed == whole, "exactly"
    assert len(calls) == 4 * 7 + 2, "nothing is drawn twice but what was lost"
    monkeypatch.setattr(Sampler, "draw", None)
    assert run(teacher, reference, tmp_path / "stopped") == whole, "a finished one draws nothing"


def test_another_evaluation_in_the_same_folder_is_refused(teacher: Artefact, reference: Part, tmp_path: Path) -> None:
    small = replace(SETTINGS, count=16, repetitions=1)
    run(teacher, reference, tmp_path, small)
    with pytest.raises(ValueError, match=r"holds another evaluation.*neighbours \(there 3, asked 5\)"):
        run(teacher, reference, tmp_path, replace(small, neighbours=5))


def test_parts_are_what_they_were_after_saving(tmp_path: Path) -> None:
    rng, part = np.random.default_rng(1), Part.empty(scored=70)
    rows = rng.standard_normal((50, 3)).astype(np.float32)
    logits = rng.standard_normal((70, 7)).astype(np.float32)
    for begin in range(0, 50, 16):
        end = min(begin + 16, 50)
        part.add({"features": rows[begin:end], "logits": logits[begin:end]}, limit=20)
    part.save(tmp_path / "a" / "part.npz")
    again = Part.load(tmp_path / "a" / "part.npz")
    for found in (part, again):
        assert found.count == 50 and found.inception is not None
        np.testing.assert_array_equal(found.kept, rows[:20])
        with pytest.raises(ValueError, match="50 images were added; the parts are of 70"):
            found.inception.score()
        found.inception.add(logits[50:])
        assert found.inception.score().scores.tolist() == inception_score(logits, splits=10).scores.tolist()
        np.testing.assert_allclose(found.moments["features"].cov, np.cov(rows.T), rtol=1e-5)
    np.testing.assert_array_equal(again.moments["features"].cov, part.moments["features"].cov)
    assert Part.load(tmp_path / "none.npz").count == 0


def test_extrapolation_takes_off_what_few_images_add() -> None:
    """Gaussians of equal distribution, whose distance is b/n: to many images it is near 0. No measured value."""
    rng, parts = np.random.default_rng(0), []
    for count in (400, 100_000):
        part = Part.empty()
        part.add({"features": rng.standard_normal((count, 16))}, limit=400)
        parts.append(part)
    few, reference = parts
    found = evaluation.scores(few, reference, replace(SETTINGS, kept=400, extrapolate=10**6))
    assert abs(found["frechet extrapolated from 400 to 1000000"]) < 0.4 * found["frechet"]
    assert not any("extrapolated" in name for name in evaluation.scores(few, reference, SETTINGS))


def test_features_of_your_own(teacher: Artefact, tmp_path: Path) -> None:
    mean = FromFunction(lambda images: images.reshape(len(images), -1)[:, :2].astype(np.float64), "corner", 2)
    settings = replace(SETTINGS, count=32, repetitions=1)
    reference = reference_of(from_arrays(real_images()), mean, settings, tmp_path / "reference.npz")
    assert reference.moments["features"].width == 2
    again = reference_of(from_arrays(real_images()), mean, settings, tmp_path / "reference.npz")
    np.testing.assert_array_equal(again.kept, reference.kept)
    rows = evaluate_samplers(samplers_of(teacher), mean, reference, settings, {}, tmp_path, lambda line: None)
    assert json.loads((tmp_path / "results.json").read_text())["features"] == "corner" and rows[0]["frechet"] > 0
    with pytest.raises(FileNotFoundError):
        features_named(str(tmp_path / "nothing"), SHAPE)


def test_pixels_are_one_thing_everywhere(teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to 8 bits, k / 127.5 - 1: the same digits from Python, an evaluation, and the monitor of a run."""
    settings = replace(SETTINGS, repetitions=1, kept=100)
    real = from_arrays(real_images())
    floats = real.gather(np.arange(len(real)))["x"]
    [row] = evaluate_samplers(
        {"ddim": partial(sampler_of, teacher, steps=2)},
        PIXELS,
        reference_of(real, PIXELS, settings),
        settings,
        {},
        tmp_path,
    )
    drawn = api.sample(teacher, 100, 2, batch_size=40)
    # A set of its own, from the definition.
    levels = [(np.floor(127.5 * x + 128).clip(0, 255) / 127.5 - 1).reshape(len(x), -1) for x in (drawn, floats)]
    found = api.evaluate(drawn, floats)
    assert found["frechet"] == pytest.approx(frechet_distance(*map(moments, levels)), rel=1e-5)
    assert found["frechet"] != frechet_distance(*(moments(pixel_features(x)) for x in (drawn, floats)))
    assert found == api.evaluate(drawn, real_images()) == api.evaluate(quantise(drawn), floats), "uint8 are 8 bits"
    assert found == api.evaluate(drawn, floats, features=PIXELS)
    assert found == {name: row[name] for name in found}, "to the last digit, whatever the batches"
    figures: dict[str, float] = {}
    monkeypatch.setattr(Monitor, "_write", lambda self, update, phase, rows, scores: figures.update(scores))
    run_settings = api.Settings(batch_size=8, evaluate_count=90)
    watch = Monitor(teacher.model, real, run_settings, [], None, None)  # type: ignore[arg-type]
    watch(1, Phase("a phase", 1, 1e-3, student_steps=2), create(teacher.params, optax.sgd(0.1), ()))
    assert {name: figures[f"{name}/eval"] for name in found} == api.evaluate(drawn[:90], floats)


@pytest.mark.fast
@pytest.mark.parametrize("width", [3, 1500])
def test_moments_do_not_depend_on_how_images_were_cut_into_batches(width: int, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((2500, width), np.float32) + 100
    parts = []
    for sizes in ([2500], [7] * 300 + [400], [1024, 1024, 452]):
        part, begin = Part.empty(), 0
        for number, size in enumerate(sizes):
            part.add({"features": rows[begin : begin + size]}, limit=10)
            begin += size
            if number == 1:
                part.save(tmp_path / "part.npz")
                part = Part.load(tmp_path / "part.npz")
        parts.append(part)
    mean, cov = rows.astype(np.float64).mean(axis=0), np.cov(rows[:, :3].astype(np.float64).T)
    for part in parts:
        found = part.moments["features"]
        assert found.count == part.count == 2500 and part.digest() == parts[0].digest(), "the same bits"
        np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(found.cov[:3, :3], cov, rtol=1e-9, atol=1e-12)
    assert part.moments["features"] is part.moments["features"], "factored once"


class Counted(Pixels):
    """Pixels that say how many images they were asked about."""

    asked: ClassVar[list[int]] = []

    def __call__(self, images: Any) -> np.ndarray:
        self.asked.append(len(images))
        return super().__call__(images)


@pytest.mark.fast
def test_a_remembered_reference_is_found_by_its_content(tmp_path: Path) -> None:
    """Other images under the same name are measured again, the same images elsewhere are not."""
    Counted.asked.clear()
    features, reals = Counted(SHAPE), real_images(30)
    for number, image in enumerate(reals):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "images" / f"{number:02d}.bmp")

    def measured(place: str, settings: EvaluationSettings = SETTINGS) -> tuple[int, str]:
        before = sum(Counted.asked)
        found = reference_of(folder(tmp_path / place, memory=0), features, settings, tmp_path / "work")
        return sum(Counted.asked) - before, found.digest()

    whole = Part.of(PIXELS, reals).digest()
    assert measured("images") == (30, whole) and measured("images") == (0, whole)
    shutil.copytree(tmp_path / "images", tmp_path / "copy", copy_function=shutil.copyfile)
    assert measured("copy") == (0, whole)
    assert measured("images", replace(SETTINGS, kept=7))[0] == 30
    assert measured("images", replace(SETTINGS, quantisation="truncate"))[0] == 30
    times = (tmp_path / "images" / "11.bmp").stat()
    Image.fromarray(255 - reals[11, ..., 0]).save(tmp_path / "images" / "11.bmp")
    os.utime(tmp_path / "images" / "11.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = np.stack([255 - image if number == 11 else image for number, image in enumerate(reals)])
    assert measured("images") == (30, Part.of(PIXELS, changed).digest()) != (30, whole)


def test_a_remembered_reference_is_of_the_features_weights(tmp_path: Path) -> None:
    """A classifier that was trained again in the same folder, and Inception with other weights, are other features."""
    source, network = from_arrays(real_images(20).repeat(4, 1).repeat(4, 2)), Classifier(3, 4, (1,), norm_groups=2)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    digests = []
    for seed in (0, 1, 0):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda a, rng=rng: jnp.asarray(rng.normal(0, 0.4, a.shape), jnp.float32), shapes)
        TrainedClassifier(network, params, (8, 8, 1)).save(tmp_path / "classifier")
        features = features_named(str(tmp_path / "classifier"), (8, 8, 1))
        part = reference_of(source, features, SETTINGS, tmp_path)
        assert part.digest() == Part.of(features, real_images(20).repeat(4, 1).repeat(4, 2)).digest()
        digests.append(part.digest())
    assert digests[0] == digests[2] != digests[1] and len(list(tmp_path.glob("reference-*.npz"))) == 2
    own = [FromFunction(lambda images: images[:, 0, 0], "a name", 1, version) for version in ("1", "2", "")]
    inception = [Inception({"a": jnp.full(3, value)}) for value in (1.0, 2.0)]
    assert [evaluation.weights_of(found) for found in own] == ["1", "2", ""]
    assert evaluation.weights_of(inception[0]) != evaluation.weights_of(inception[1])
    reference_of(source, own[2], SETTINGS, tmp_path)
    assert len(list(tmp_path.glob("reference-*.npz"))) == 2, "nothing is remembered of features nobody knows"


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(6,), (5, 2), (4, 4, 1), (2, 2, 2, 3)])
@pytest.mark.parametrize("bounded", [True, False])
def test_data_of_any_shape_and_any_function_as_features(shape: tuple[int, ...], bounded: bool) -> None:
    """Of two normal distributions of one number the distance is (m - m')² + (s - s')², moved and scaled by the data."""
    rng, seen = np.random.default_rng(0), []
    samples, others = (0.2 * rng.standard_normal((400, *shape)).clip(-3, 3) + shift for shift in (0.0, 0.1))

    def mean(batch: np.ndarray) -> np.ndarray:
        seen.append(batch)
        numbers = batch.reshape(len(batch), -1).mean(axis=1, keepdims=True)
        return numbers / 127.5 - 1 if bounded else numbers

    far = 1.0 if bounded else 50.0  # nothing is clipped that has no bounds
    found = dd.evaluate(far * samples, far * others, features=mean, data_range=(-1, 1) if bounded else None)
    assert seen[0].dtype == (np.uint8 if bounded else np.float64)
    means, stds = zip(*((np.mean(part), np.std(part)) for part in (mean(batch) for batch in list(seen))), strict=True)
    assert found["frechet"] == pytest.approx((means[0] - means[1]) ** 2 + (stds[0] - stds[1]) ** 2, rel=2e-2)
    assert set(dd.evaluate(samples, others, data_range=None)) == {"frechet", "precision", "recall"}
    if bounded:
        moved = dd.evaluate(3 + 2 * samples, 3 + 2 * others, features=mean, data_range=(1, 5))
        assert moved == pytest.approx(found, rel=1e-3)


class Scored(Inception):
    """Inception's outputs without its network, and how many images' outputs were alive whenever more were asked for."""

    alive: ClassVar[list[weakref.ref]] = []
    most: ClassVar[list[int]] = []

    def __call__(self, images: Any) -> InceptionFeatures:
        self.most.append(sum(len(found) for reference in self.alive if (found := reference()) is not None))
        flat = images.reshape(len(images), -1) / np.float32(50)
        found = InceptionFeatures(flat, flat + 1, np.sin(np.arange(7, dtype=np.float32) * flat[:, :1]))
        self.alive.extend(map(weakref.ref, found))
        return found


@pytest.mark.fast
def test_an_evaluation_holds_no_more_than_two_batches(teacher: Artefact, tmp_path: Path) -> None:
    """... beside what it keeps, and its numbers are those of all images at once."""
    Scored.alive.clear()
    Scored.most.clear()
    settings, features = replace(SETTINGS, repetitions=1, batch_size=8, kept=10), Scored({})
    reference = reference_of(from_arrays(real_images()), features, settings)
    sampler = {"ddim": partial(sampler_of, teacher, steps=1)}
    [row] = evaluate_samplers(sampler, features, reference, settings, {}, tmp_path, lambda line: None)
    assert len(Scored.most) == 12 + 13 and max(Scored.most) <= 2 * 3 * settings.batch_size
    taken, real = (features(quantise(images)) for images in (api.sample(teacher, 100, 1), real_images()))
    found = frechet_distance(moments(taken.spatial), moments(real.spatial))
    assert row["sfid"] == pytest.approx(found, rel=1e-4)
    assert row["inception_score"] == pytest.approx(inception_score(taken.logits, splits=10).mean, rel=1e-4)
