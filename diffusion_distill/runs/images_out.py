"""Samples as files: 8-bit images in a folder or a zip of PNGs, or in an npz.

png, zip     00000/img00000000.png …, a folder per thousand, and dataset.json with the labels, as EDM's tools read
npz          images uint8 [n, height, width, channels] as arr_0, labels as arr_1, as OpenAI's evaluator reads
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusion_distill.errors import choose
from diffusion_distill.quantise import quantise


def save_images(images: np.ndarray, folder: str | Path, form: str = "npz", labels: np.ndarray | None = None) -> Path:
    """Writes images; returns the file or folder, FOLDER/samples.npz, samples.zip or samples.

    Args:
      images: [n, height, width, 1 or 3], in [-1, 1] (rounded half up) or uint8; npz takes any number of channels.
      form: 'npz', 'png' or 'zip'.
      labels: [n] whole numbers.

    Raises:
      ValueError: an unknown form, labels of another number, or channels that PNG does not have.
    """
    write, folder = choose("form of images", form, FORMS), Path(folder)
    if labels is not None and np.shape(labels) != (len(images),):
        raise ValueError(f"{len(images)} images need as many labels, got {np.shape(labels)}.")
    if form != "npz" and images.shape[-1] not in (1, 3):
        raise ValueError(f"PNGs have 1 or 3 channels; these images have {images.shape[-1]}: take form='npz'.")
    folder.mkdir(parents=True, exist_ok=True)
    return write(np.asarray(quantise(images)), folder, labels)


def _npz(images: np.ndarray, folder: Path, labels: np.ndarray | None) -> Path:
    path = folder / "samples.npz"
    if labels is None:
        np.savez_compressed(path, arr_0=images)
    else:
        np.savez_compressed(path, arr_0=images, arr_1=labels)
    return path


def _png(images: np.ndarray, folder: Path, labels: np.ndarray | None) -> Path:
    root = folder / "samples"
    for number, image in enumerate(images):
        path = root / _name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(image))
    (root / "dataset.json").write_text(_labels_json(len(images), labels), encoding="utf-8")
    return root


def _zip(images: np.ndarray, folder: Path, labels: np.ndarray | None) -> Path:
    path = folder / "samples.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for number, image in enumerate(images):
            file.writestr(_name(number), _encoded(image))
        file.writestr("dataset.json", _labels_json(len(images), labels))
    return path


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


FORMS: dict[str, Callable[[np.ndarray, Path, np.ndarray | None], Path]] = {"npz": _npz, "png": _png, "zip": _zip}
