"""The classifier: it learns, is the same after a stop, a save and on other devices, and refuses what it cannot read.

Accuracies are counted here from labels, shifts are compared with slices of padded images, the loss with its formula
in float64.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import ROOT
from toys import equal

from diffusion_distill.api import classifier
from diffusion_distill.api.classifier import ClassifierSettings, TrainedClassifier, shifted, train_classifier
from diffusion_distill.base import interrupts
from diffusion_distill.base.registry import describe, from_mapping, rebuild
from diffusion_distill.data import ArraySource, digits, from_arrays
from diffusion_distill.evaluation import frechet_distance, moments, pixel_features
from diffusion_distill.evaluation.classifier_network import CLASSIFIERS, Classifier
from diffusion_distill.training import loop
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.sharding import data_mesh

SMALL = ClassifierSettings(
    length=32 * 160, batch_size=32, learning_rate=1e-2, warmup=10, residual=1e-2, ch_mult=(1, 2), norm_groups=4
)
BRIEF = ClassifierSettings(length=64, batch_size=16, ch=4, ch_mult=(1,), norm_groups=2, checkpoint_every=1, log_every=1)


def part(split: str, count: int) -> ArraySource:
    """The first digits of a split."""
    whole = digits(split)
    assert whole.cond is not None
    return ArraySource(whole.x[:count], whole.cond[:count], 10, whole.value_range)


@pytest.fixture(scope="module")
def heldout() -> ArraySource:
    """Digits nothing is trained on."""
    return part("heldout", 300)


@pytest.fixture(scope="module")
def trained(heldout: ArraySource) -> TrainedClassifier:
    """A classifier of the first 400 digits."""
    return train_classifier(part("train", 400), heldout, SMALL)


def pixels(source: ArraySource) -> np.ndarray:
    """All images of a source."""
    return source.gather(np.arange(len(source)))["x"]


@cache
def untrained(shape: tuple[int, int, int] = (8, 8, 1), ch: int = 4) -> TrainedClassifier:
    """A classifier that has learned nothing: random parameters, none of them zero, without compiling anything."""
    network, rng = Classifier(num_classes=3, ch=ch, ch_mult=(1, 2), norm_groups=2), np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.4, a.shape), jnp.float32), shapes)
    return TrainedClassifier(network, params, shape, {"accuracy": 1 / 3})


# What it learns


def test_it_learns_the_digits(trained: TrainedClassifier, heldout: ArraySource) -> None:
    said = trained.logits(pixels(heldout)).argmax(axis=1)
    right = float(np.mean(said == heldout.cond))
    assert right > 0.85  # one in ten by chance
    assert trained.accuracy(heldout) == trained.about["accuracy"] == right
    assert trained.accuracy(heldout, batch_size=7) == right
    assert trained.about["data"] == {"images": 400, "shape": [8, 8, 1], "classes": 10}
    assert trained.about["heldout"]["images"] == 300 and trained.about["updates"] == 160


def test_its_features_see_what_pixels_do_not(trained: TrainedClassifier, heldout: ArraySource) -> None:
    # Digits moved by a pixel are the same digits; a set without its eights is another set. Pixels say the opposite.
    images, labels = pixels(heldout), heldout.cond
    assert labels is not None
    moved = np.pad(images, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-1)[:, :, :-1]

    def moved_over_without(features: Callable[[np.ndarray], np.ndarray]) -> float:
        real, others = moments(features(images)), (moved, images[labels != 8])
        distance, without = (frechet_distance(real, moments(features(other))) for other in others)
        return distance / without

    assert trained.features(images).shape == (300, trained.network.width) == (300, 32)
    assert moved_over_without(trained.features) < moved_over_without(pixel_features) / 10


def test_a_stopped_training_goes_on_as_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = (part("train", 40), part("heldout", 20)), dataclasses.replace(BRIEF, seed=1)
    whole = train_classifier(*data, BRIEF)
    checks: list[int] = []

    def stop_after_two() -> None:
        checks.append(1)
        if len(checks) == 2:
            raise interrupts.Interrupted("test")

    with monkeypatch.context() as stopping:
        stopping.setattr(interrupts, "check", stop_after_two)
        with pytest.raises(interrupts.Interrupted):
            train_classifier(*data, BRIEF, tmp_path)
    assert not (tmp_path / "classifier").exists()
    resumed = train_classifier(*data, BRIEF, tmp_path)
    assert equal(resumed.params, whole.params) and resumed.fingerprint == whole.fingerprint
    assert [record["update"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert equal(TrainedClassifier.load(tmp_path / "classifier").params, whole.params)
    with pytest.raises(ValueError, match=r"another run; it differs in .*settings\.seed"):
        train_classifier(*data, other, tmp_path)
    assert train_classifier(*data, other).fingerprint != whole.fingerprint


@pytest.mark.fast
def test_a_file_in_its_place_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classifier").write_text("notes")
    monkeypatch.setattr(loop, "run", lambda *_, **__: pytest.fail("the training has begun"))
    with pytest.raises(ValueError, match=r"Cannot write to .*classifier: there is a file of that name"):
        train_classifier(part("train", 40), part("heldout", 20), BRIEF, tmp_path)
    assert (tmp_path / "classifier").read_text() == "notes"


# What it computes


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (5, 7, 3), (1, 1, 2)])
def test_it_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    made = untrained(shape)
    images = np.random.default_rng(0).uniform(-1, 1, (3, *shape)).astype(np.float32)
    assert made.features(images).shape == (3, 8) and made.logits(images).shape == (3, 3)
    assert made.features(images).dtype == np.float32
    kernel, bias = (np.asarray(made.params["dense_out"][name], np.float64) for name in ("kernel", "bias"))
    np.testing.assert_allclose(made.logits(images), made.features(images) @ kernel + bias, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
def test_features_depend_on_the_image_alone() -> None:
    made, images = untrained(), pixels(part("heldout", 21))
    found = made.features(images)
    assert np.ptp(found, axis=0).min() > 1e-3, "images differ"
    for other in (
        made.features(images, batch_size=1),
        made.features(images, batch_size=8),
        made.features(images, mesh=data_mesh(jax.devices()[:1])),
        made.features(images, batch_size=6, mesh=data_mesh(jax.devices()[:3])),
        made.features(images[::-1])[::-1],
        np.concatenate([made.features(images[:4]), made.features(images[4:])]),
    ):
        np.testing.assert_allclose(other, found, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
def test_bytes_and_floats_are_the_same_images() -> None:
    made, levels = untrained(), np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    floats = levels / 127.5 - 1
    np.testing.assert_allclose(made.features(levels), made.features(floats), rtol=1e-5, atol=1e-6)
    kept = floats.copy()
    np.testing.assert_array_equal(made.features(2 * floats), made.features(np.clip(2 * floats, -1, 1)))
    np.testing.assert_array_equal(floats, kept)


@pytest.mark.fast
def test_shifts_are_numpys() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (9, 5, 4, 2)).astype(np.float32)
    offsets = np.array([(down, right) for down in (-1, 0, 2) for right in (-3, 0, 1)])
    found = np.asarray(shifted(jnp.asarray(images), jnp.asarray(offsets)))
    for image, (down, right), moved in zip(images, offsets, found, strict=True):
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), constant_values=-1)
        expected = padded[3 - down : 8 - down, 3 - right : 7 - right]
        np.testing.assert_allclose(moved, expected, atol=2e-7)


@pytest.mark.fast
def test_the_loss_is_the_smoothed_cross_entropy() -> None:
    settings = ClassifierSettings(shift=0, label_smoothing=0.3)
    training = classifier._Training(Classifier(num_classes=4), settings)
    logits = np.random.default_rng(0).normal(0, 2, (6, 4))
    labels = np.array([0, 1, 2, 3, 3, 0])
    said = lambda images: classifier.Classified(jnp.asarray(logits, jnp.float32), images)  # noqa: E731
    batch = {"x": jnp.zeros((6, 2, 2, 1)), "cond": jnp.asarray(labels)}
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -0.7 * log_p[np.arange(6), labels] - 0.3 * log_p.mean(axis=1)
    np.testing.assert_allclose(training.losses({"student": said}, (), batch, jax.random.key(0)), expected, rtol=1e-5)


# On disk and in words


def test_it_is_the_same_from_disk(trained: TrainedClassifier, heldout: ArraySource, tmp_path: Path) -> None:
    read = TrainedClassifier.load(trained.save(tmp_path / "digits"))
    assert read.network == trained.network and read.shape == (8, 8, 1)
    assert read.fingerprint == trained.fingerprint and read.about["accuracy"] == trained.about["accuracy"]
    np.testing.assert_array_equal(read.features(pixels(heldout)), trained.features(pixels(heldout)))
    untrained().save(tmp_path / "digits")  # in its place
    assert TrainedClassifier.load(tmp_path / "digits").network.num_classes == 3


@pytest.mark.fast
@pytest.mark.parametrize("after", range(4))
def test_killed_at_any_moment_a_classifier_is_the_old_or_the_new_one(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that ends after so many changes of names, before each of which the folder is read."""
    old, new = untrained(), untrained(ch=6)
    both, folder, done = {old.fingerprint: old.network, new.fingerprint: new.network}, old.save(tmp_path / "c"), []
    replace = os.replace

    def killed(begin: Any, end: Any, **others: Any) -> None:
        if Path(begin).parent == folder:  # else it is Orbax's
            found = TrainedClassifier.load(folder)
            assert found.network == both[found.fingerprint]
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(begin)
        replace(begin, end, **others)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with nullcontext() if after == 3 else pytest.raises(KeyboardInterrupt):
            new.save(folder)
    assert TrainedClassifier.load(folder).network == (new if after == 3 else old).network
    assert TrainedClassifier.load(new.save(folder)).fingerprint == new.fingerprint
    assert {path.name for path in folder.iterdir()} == {"params", "classifier.json"}


SPOIL: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no parameters": (lambda f: shutil.rmtree(f / "params"), FileNotFoundError, "params"),
    "a part of them missing": (lambda f: shutil.rmtree(f / "params" / "d"), ValueError, "params are damaged"),
    "another width": (lambda f: edit(f, classifier={"name": "classifier", "num_classes": 3}), ValueError, "damaged"),
    "half a description": (lambda f: (f / "classifier.json").write_text("{"), ValueError, r"classifier\.json.*damaged"),
    "no shape": (lambda f: edit(f, shape=[8, "8", 1]), ValueError, r"classifier\.json.*'shape'.*'8'"),
    "a list of facts": (lambda f: edit(f, about=[]), ValueError, r"classifier\.json.*'about'"),
    "an unknown name": (lambda f: edit(f, classifier={"name": "clasifier"}), ValueError, r"\.json.*Did you mean"),
    "a mistyped field": (
        lambda f: edit(f, classifier={"name": "classifier", "num_classes": 3, "ch": "4"}), TypeError, r"\.json.*'ch'",
    ),
}  # fmt: skip


def edit(folder: Path, **changes: Any) -> None:
    """Changes fields of a classifier's description."""
    path = folder / "classifier.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.fast
@pytest.mark.parametrize(("spoil", "error", "said"), SPOIL.values(), ids=SPOIL)
def test_a_damaged_classifier_says_what_is_wrong(
    spoil: Callable[[Path], Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    spoil(untrained().save(tmp_path))
    with pytest.raises(error, match=said):
        TrainedClassifier.load(tmp_path)


@pytest.mark.fast
def test_a_folder_that_is_no_classifier_or_has_changed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="WORKDIR/classifier"):
        TrainedClassifier.load(tmp_path)
    edit(untrained().save(tmp_path), fingerprint="0" * 16)
    with pytest.raises(ValueError, match="have changed since"):
        TrainedClassifier.load(tmp_path)


@pytest.mark.fast
def test_the_network_can_be_written_down() -> None:
    network = Classifier(num_classes=5, ch=8, ch_mult=[1, 3], num_res_blocks=2, norm_groups=4)
    again = rebuild("classifier", json.loads(json.dumps(describe(network, CLASSIFIERS))), CLASSIFIERS)
    assert again == network and hash(again) == hash(network) and again.width == 24


IMAGES = np.zeros((2, 8, 8, 1), np.float32)
REFUSED = {
    "another size": (IMAGES[:, :7], ValueError, r"shape \(2, 7, 8, 1\).* trained on \(8, 8, 1\)"),
    "one image": (IMAGES[0], ValueError, r"need \[n, 8, 8, 1\]"),
    "no images": (IMAGES[:0], ValueError, "n at least 1"),
    "integers": (IMAGES.astype(np.int32), TypeError, "int32; need uint8"),
    "NaN": (np.where(np.arange(2)[:, None, None, None], np.nan, IMAGES), ValueError, "1 of 2 images hold NaN"),
    "infinity": (
        np.where(np.arange(2)[:, None, None, None], np.inf, IMAGES),
        ValueError,
        "1 of 2 images hold NaN or inf",
    ),
    "grey levels": (IMAGES + np.float32(255) * (np.arange(8) > 3)[:, None], ValueError, "from 0 to 255.*as uint8"),
}


@pytest.mark.fast
@pytest.mark.parametrize(("images", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_images_it_cannot_read_are_refused(images: np.ndarray, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        untrained().features(images)


@pytest.mark.fast
def test_data_it_cannot_learn_from_are_refused(tmp_path: Path) -> None:
    good, labels = part("train", 20), np.arange(20) % 4
    unlabelled, wide = from_arrays(pixels(good)), from_arrays(np.zeros((20, 8, 9, 1), np.uint8), labels, 10)
    fewer = from_arrays(pixels(good), labels)
    for source, heldout, said in (
        (unlabelled, good, "training data have no labels"),
        (good, unlabelled, "held-out data have no labels"),
        (good, wide, r"\(8, 9, 1\), the classifier is for \(8, 8, 1\)"),
        (good, fewer, "4 classes, the classifier is for 10"),
    ):
        with pytest.raises(ValueError, match=said):
            train_classifier(source, heldout, BRIEF, tmp_path / "none")
    with pytest.raises(ValueError, match="The data have no labels"):
        untrained().accuracy(unlabelled)
    with pytest.raises(ValueError, match=r"multiple of the number of devices \(8\)"):
        train_classifier(good, good, ClassifierSettings(batch_size=12), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": "10"}, "too few"),
        ({"length": "many"}, "number of samples"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"shift": -1}, "shift must be .*at least 0, got -1"),
        ({"residual": 0.0}, "residual"),
        ({"ch": 12}, "8 equal groups"),
        ({"ch_mult": ()}, "ch_mult is empty"),
        ({"label_smothing": 0.1}, "Did you mean 'label_smoothing'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_mapping(ClassifierSettings, "classifier", settings)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["digits_classifier", "mnist_classifier"])
def test_configs_hold_every_setting(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    settings = from_mapping(ClassifierSettings, "classifier", config.classifier.to_dict())
    assert set(config.classifier) == set(vars(settings))
    assert config.data.name == config.reference.name and config.data.split != config.reference.split
    if name == "mnist_classifier":
        given = module.get_config("a.npz,b.npz")
        assert (given.data.path, given.reference.path) == ("a.npz", "b.npz")
        with pytest.raises(ValueError, match=r"Give two: .*a\.npz,HELDOUT\.npz"):
            module.get_config("a.npz")
