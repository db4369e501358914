"""Tfds: data sets prepared by TensorFlow Datasets, read by name and folder without TensorFlow.

A set must have been prepared in the format array_record, the one that can be read in any order:

    pip install tensorflow-cpu                  # the extra [prepare]
    tfds build cifar10 --data_dir=DIR --file_format=array_record

| set                    | source, as BTD prepares it                                               | classes |
|------------------------|--------------------------------------------------------------------------|---------|
| CIFAR-10               | tfds("cifar10", "train")                                                 | 10      |
| ImageNet 64            | tfds("imagenet2012", "train", size=64, resample="area")                  | 1000    |
| LSUN bedroom 128       | tfds("lsun/bedroom", "train", size=128, resample="bilinear")             | none    |
| LSUN church 128        | tfds("lsun/church_outdoor", "train", size=128, resample="bilinear")      | none    |

`downsampled_imagenet/64x64` is another, unlabelled set. `imagenet2012` has to be downloaded by hand before it is
prepared (--manual_dir). Names are those of tensorflow-datasets 4.9.10. Nothing here touches the network unless
told `download=True`.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from functools import partial
from pathlib import PurePath
from typing import Any

from diffusion_distill.base.errors import choose
from diffusion_distill.base.files import user_path
from diffusion_distill.data.dataset import from_dataset
from diffusion_distill.data.fingerprint import digest
from diffusion_distill.data.lazy import MEMORY, Report, usual_threads
from diffusion_distill.data.sources import Source

FORMAT = "array_record"


def tfds(
    dataset: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image: str = "image",
    label: str | None = "label",
    size: int | None = None,
    crop: str = "center",
    resample: str = "area",
    channels: int | None = None,
    num_classes: int | None = None,
    download: bool = False,
    memory: int = MEMORY,
    threads: int | None = None,
    report: Report | None = None,
) -> Source:
    """A source of a data set prepared by TensorFlow Datasets.

    Args:
        dataset: "set", "set/config" or either with ":version"; without a version the newest prepared one.
        split: "train", "test", "train[:50%]", ...
        data_dir: folder of all prepared sets; None or "": $TFDS_DATA_DIR, else ~/tensorflow_datasets.
        image, label: names of the features; without a feature "label", or with None, the set has no labels.
        num_classes: None: as the set itself says.
        download: download and prepare the set if it is not there; TFDS's own sets need TensorFlow for it.
        size, crop, resample, channels, memory, threads, report: see `folder`.

    Raises:
        FileNotFoundError: the set is not prepared there; the message has the command that prepares it.
        ImportError: tensorflow-datasets, or for a download TensorFlow, is not installed.
        ValueError: prepared in another format, several configs, unknown split or feature; or as `from_dataset`.
    """
    builder, library = _builder(dataset, data_dir, download)
    features = builder.info.features
    choose(f"feature of {dataset}:", image, features)
    if label == "label" and label not in features:
        label = None
    if label is not None:
        choose(f"feature of {dataset}:", label, features)
        num_classes = num_classes or getattr(features[label], "num_classes", None)
    encoded = isinstance(features[image], library.features.Image)
    as_stored = {image: library.decode.SkipDecoding()} if encoded else None  # `decode` opens it
    examples = builder.as_data_source(split, decoders=as_stored, file_format=FORMAT)
    height, width = (*(getattr(features[image], "shape", None) or ()), None, None)[:2]
    return from_dataset(
        examples, size, x=image, cond=label, num_classes=num_classes, crop=crop, resample=resample,
        channels=channels, memory=memory, threads=usual_threads(threads, height or 2**16, width or 1), report=report,
        identity=partial(_identity, builder, (split, image, size, crop, resample, channels)),
    )  # fmt: skip


def _identity(builder: Any, how: tuple) -> str:
    """Of the prepared files as they are: a copy of them is another set."""
    files = sorted((file.name, file.stat().length, file.stat().mtime) for file in builder.data_path.iterdir())
    return digest([repr((files, how)).encode()])


def _builder(dataset: str, data_dir: str | os.PathLike[str] | None, download: bool) -> tuple[Any, Any]:
    """The prepared set as TFDS's builder, and the library; errors as `tfds`."""
    try:
        import tensorflow_datasets as library
    except ImportError as error:
        raise ImportError(
            f"Reading {dataset!r} needs TensorFlow Datasets ({error}). "
            "Install it with `pip install tensorflow-datasets importlib_resources`."
        ) from error

    data_dir = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    data_dir = data_dir if "://" in data_dir else os.fspath(user_path(data_dir))
    place = _find(dataset, data_dir)
    if place is None and download:
        _prepare(dataset, data_dir)
        place = _find(dataset, data_dir)
    if place is None:
        raise FileNotFoundError(
            f"The data set {dataset!r} is not prepared in {data_dir}. Prepare it once:\n"
            f"{_command(dataset, data_dir)}\nOr pass download=True, or the data_dir that has it."
        )
    builder = library.builder_from_directory(place)
    formats = {found.value for found in builder.info.available_file_formats()}
    if FORMAT not in formats:  # of the others, parquet claims random access and fails at it
        raise ValueError(
            f"{dataset!r} in {place} is prepared as {' and '.join(sorted(formats)) or 'an unknown format'}, which "
            f"cannot be read in random order. Prepare it as {FORMAT}, in another data_dir:\n"
            + _command(dataset, data_dir.rstrip("/") + "_" + FORMAT)
        )
    return builder, library


def _find(name: str, data_dir: str) -> str | None:
    """The folder DATA_DIR/set[/config]/version of a prepared set, None if there is none.

    Raises:
      ValueError: the set has several configs and none is named.
    """
    from etils import epath  # comes with tensorflow-datasets; reads gs:// too

    wanted, _, version = name.partition(":")
    folder = epath.Path(data_dir) / wanted
    versions = _versions(folder)
    if not versions and "/" not in wanted and folder.exists():
        variants = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and _versions(sub))
        if variants:
            raise ValueError(
                f"{name!r} is prepared in {data_dir} with configs; name one: "
                + ", ".join(f"{wanted}/{variant}" for variant in variants)
            )
    if version:
        return os.fspath(folder / version) if version in versions else None
    return os.fspath(folder / max(versions, key=_version_number)) if versions else None


def _versions(folder: Any) -> list[str]:
    if not folder.exists():
        return []
    return [sub.name for sub in folder.iterdir() if _version_number(sub.name) and (sub / "features.json").exists()]


def _version_number(version: str) -> tuple[int, ...]:
    """(1, 0, 2) of "1.0.2", () of other names."""
    parts = PurePath(version).name.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(part.isdigit() for part in parts) else ()


def _command(name: str, data_dir: str) -> str:
    return (
        "  pip install tensorflow-cpu\n"
        f"  tfds build {shlex.quote(name)} --data_dir={shlex.quote(data_dir)} --file_format={FORMAT}"
    )


def _prepare(name: str, data_dir: str) -> None:
    """Downloads and prepares a set."""
    import tensorflow_datasets

    builder = tensorflow_datasets.builder(name, data_dir=data_dir, file_format=FORMAT)
    needs_tensorflow = type(builder).__module__.startswith("tensorflow_datasets.")
    if needs_tensorflow and importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"Preparing {name!r} needs TensorFlow. Install it with `pip install tensorflow-cpu`; "
            "reading the prepared set does not need it."
        )
    builder.download_and_prepare()
