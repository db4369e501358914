"""The features that a config or a command names: pixels, a trained classifier's, or Inception's."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from diffusion_distill.api.classifier import TrainedClassifier
from diffusion_distill.base.errors import choose
from diffusion_distill.base.files import user_path
from diffusion_distill.evaluation.features import RULES as INPUT_RULES
from diffusion_distill.evaluation.features import FromFunction, Inception, Pixels
from diffusion_distill.evaluation.measuring import IMAGES, Measured, Range, as_features
from diffusion_distill.training import checksum, sharding
from diffusion_distill.weights.inception import FACTS, load_inception


def features_named(name: str, shape: Sequence[int], data_range: Range = IMAGES) -> Measured:
    """The features that a config names.

    Args:
      name: 'pixels' (of data without a range, their values); or the folder of a classifier or of imported Inception
        weights, behind which ':tensorflow' or ':pytorch_fid' names the input rule of the latter.

    Raises:
      FileNotFoundError: a folder that holds neither.
      ValueError: a classifier of images of another shape, or an unknown rule.
    """
    if name == "pixels":
        return as_features(None, shape, data_range)
    folder, rule = user_path(name), ""
    if not folder.is_dir() and ":" in name:  # colons may belong to the folder's name
        before, _, after = name.rpartition(":")
        if after in INPUT_RULES or user_path(before).is_dir():
            choose("input rule", after, INPUT_RULES)
            folder, rule = user_path(before), after
    if (folder / "classifier.json").is_file():
        trained = TrainedClassifier.load(folder)
        if tuple(trained.shape) != tuple(shape):
            raise ValueError(f"The classifier {folder} takes images {trained.shape}; these are {shape}.")
        accuracy = trained.about.get("accuracy")
        title = f"classifier {trained.fingerprint}, held-out accuracy {accuracy}"
        return FromFunction(trained.features, title, int(trained.network.width), trained.fingerprint)
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no features: neither a classifier's classifier.json nor {FACTS}, which --mode=import "
            "writes for the weights of FID's InceptionV3. Give such a folder, or 'pixels'."
        )
    weights = load_inception(folder)
    # Each process measures all images, on its own devices.
    place = sharding.replicated(sharding.data_mesh(jax.local_devices()))
    return Inception(jax.device_put(weights.params, place), rule or weights.rule)


def weights_of(features: Measured) -> str:
    """A short text that stands for the weights behind features; empty if they are not known."""
    if isinstance(features, Inception):
        return checksum.fingerprint(jax.device_get(features.params))  # of one copy, not of every device's
    return "none" if isinstance(features, Pixels) else str(getattr(features, "fingerprint", ""))
