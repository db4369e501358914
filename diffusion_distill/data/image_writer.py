"""Samples as files: 8-bit images in a folder or a zip of PNGs, or in an npz.

png, zip     00000/img00000000.png …, a folder per thousand, and dataset.json with the labels, as EDM's tools read
npz          images uint8 [n, height, width, channels] as arr_0, labels as arr_1, as OpenAI's evaluator reads

Everything is there whole or not at all, see `base.whole`.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.base.files import writable
from diffusion_distill.base.whole import recover, remove, replaced, unfinished, whole
from diffusion_distill.data.quantise import quantise


def save_images(
    images: np.ndarray, folder: str | Path, form: str = "npz", labels: np.ndarray | None = None, bounded: bool = True
) -> Path:
    """Writes images; returns the file or folder, FOLDER/samples.npz, samples.zip or samples.

    What an earlier call has written there, in whatever form, is replaced as a whole, when all images are on disk.

    Args:
      images: [n, height, width, 1 or 3], in [-1, 1] (rounded half up) or uint8; npz takes samples of any shape.
      form: 'npz', 'png' or 'zip'.
      labels: [n] whole numbers.
      bounded: whether the samples have a range; those without are written as they are, float32, by npz only.

    Raises:
      ValueError: labels of another number, or what `check_place` refuses.
    """
    place = check_place(folder, form, images.shape[-1] if bounded and images.ndim == 4 else 0)
    if labels is not None and np.shape(labels) != (len(images),):
        raise ValueError(f"{len(images)} images need as many labels, got {np.shape(labels)}.")
    with whole(place) as half:
        FORMS[form].write(np.asarray(quantise(images) if bounded else images), half, labels)
    for other in FORMS.values():
        if place.name != other.name:
            remove(place.with_name(other.name))
    return place


def check_place(folder: str | Path, form: str, channels: int) -> Path:
    """Looks, before images are drawn, whether `save_images` can write them; returns the file or folder.

    Args:
      channels: of the images; 0 for samples that are none.

    Raises:
      ValueError: an unknown form, channels that PNG does not have, a folder that cannot be written, or one that holds
        other files than those of an earlier call, which would be lost.
    """
    name = choose("form of images", form, FORMS).name
    if form != "npz" and channels not in (1, 3):
        said = f"these images have {channels}" if channels else "these samples are no images"
        raise ValueError(f"PNGs have 1 or 3 channels; {said}: take form='npz'.")
    place = writable(folder) / name
    recover(place)
    own = [(path, form) for path in (place, replaced(place), unfinished(place))]
    for path, kind in [*own, *((place.with_name(other.name), kind) for kind, other in FORMS.items() if kind != form)]:
        others = _others(path, folders=kind == "png")
        if others:
            raise ValueError(
                f"{path} would be replaced, but holds what sampling did not write: {', '.join(others[:3])}. "
                "Move it away, or choose another folder."
            )
    return place


def _others(path: Path, folders: bool) -> list[str]:
    """Names of what is at a path and is not of `save_images`."""
    if not path.exists():
        return []
    if path.is_dir() != folders:
        return [path.name]
    if not folders:
        return []
    found = (file.relative_to(path).as_posix() for file in path.rglob("*"))
    return sorted(name for name in found if not re.fullmatch(r"\d{5,}(/img\d{8,}\.png)?|dataset\.json", name))


def _npz(images: np.ndarray, path: Path, labels: np.ndarray | None) -> None:
    arrays = (images,) if labels is None else (images, labels)
    with path.open("wb") as file:
        np.savez_compressed(file, *arrays)  # which calls them arr_0 and arr_1


def _png(images: np.ndarray, root: Path, labels: np.ndarray | None) -> None:
    root.mkdir()
    for number, image in enumerate(images):
        path = root / _name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(image))
    (root / "dataset.json").write_text(_labels_json(len(images), labels), encoding="utf-8")


def _zip(images: np.ndarray, path: Path, labels: np.ndarray | None) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for number, image in enumerate(images):
            file.writestr(_name(number), _encoded(image))
        file.writestr("dataset.json", _labels_json(len(images), labels))


def _name(number: int) -> str:
    return f"{number // 1000:05d}/img{number:08d}.png"


def _encoded(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


def _labels_json(count: int, labels: np.ndarray | None) -> str:
    pairs = None if labels is None else [[_name(number), int(labels[number])] for number in range(count)]
    return json.dumps({"labels": pairs})


class Form(NamedTuple):
    """A way to write images: the name of the file or folder, and what writes it from 8-bit images and labels."""

    name: str
    write: Callable[[np.ndarray, Path, np.ndarray | None], None]


FORMS = {"npz": Form("samples.npz", _npz), "png": Form("samples", _png), "zip": Form("samples.zip", _zip)}
