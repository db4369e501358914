"""Images: a folder or a zip of image files, with or without classes.

    folder("celeba", size=64)                        any files below celeba/, no classes
    folder("cifar10.zip", split="train")             train/<class>/<id>.jpg, test/<class>/<id>.jpg
    folder("edm-dataset.zip")                        labels from dataset.json, as EDM's tool writes it

Files come in the order of their names (paths with "/", compared by code point), so a folder and a zip of the
same files are the same set; backslashes in a zip, which programs of Windows write, count as "/". The class of a file
is the first folder below the root, where folders that hold everything count as part of the root; class numbers follow
the sorted names. Files that are hidden or no images are left out with a warning that counts them. Nothing of a zip is
ever extracted.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_distill.base.errors import near_matches, positive_int
from diffusion_distill.base.files import stand_in_of, user_path
from diffusion_distill.data.decode import check_channels, decode
from diffusion_distill.data.fingerprint import digest
from diffusion_distill.data.lazy import MEMORY, Report, hold, usual_threads
from diffusion_distill.data.resize import check_resize, resize
from diffusion_distill.data.sources import Source, check_labels

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: Names of folders that are usually splits of a data set and not its classes.
SPLITS = {"test", "testing", "train", "training", "val", "valid", "validation"}
#: No single image is larger; a zip entry that claims to be is not read.
MAX_FILE_BYTES = 256 * 2**20


def folder(
    path: str | Path,
    size: int | None = None,
    *,
    split: str | None = None,
    labels: bool | None = None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    crop: str = "center",
    resample: str = "area",
    channels: int | None = None,
    memory: int = MEMORY,
    threads: int | None = None,
    report: Report | None = None,
) -> Source:
    """A source of the image files in a folder or a zip.

    Args:
        path: the folder or zip.
        size: brings every image to [size, size] as `resize` does; None: all images have one size already.
        split: a sub-folder, such as "train", to read instead of the whole (None or "").
        labels: False ignores classes, True insists on them, None takes them where there are any.
        classes: names of the class folders in the order of their numbers; None takes the existing folders, sorted.
            For a split these are the folders of all splits, so that a class has one number in all of them.
        num_classes: at least the number of classes found; None: that number.
        crop, resample: see `resize`.
        channels: 1 (grey) or 3 (RGB); None: as the first image. Grey ones are then turned into RGB but never the
            other way round. Alpha is dropped; see `decode`.
        memory: bytes that the decoded images may take; a larger set is decoded on demand.
        threads: number of threads that decode; None takes all cores, or one for images below 64x64, where more
            threads are slower.
        report: called with (images done, number of images) while a set is read into memory.

    Raises:
        FileNotFoundError: no such path.
        ValueError: no images, no such split, unclear classes; or, naming the file, images that cannot be read or
            differ in size. If the set is decoded on demand, only the first image is read here.
    """
    check_resize(size, crop, resample)
    check_channels(channels)
    files = _open(user_path(path))
    root = _root(files, split)
    names = _images(files, root)
    numbers, found = _labels(files, root, names, labels, classes)
    num_classes = found if num_classes is None else positive_int("num_classes", num_classes)
    check_labels(numbers, len(names), num_classes)

    def pixels(name: str, channels: int | None) -> np.ndarray:
        return decode(files.read(name), files.called(name), channels)

    first = pixels(names[0], channels)
    like = first if size is None else resize(first, size, crop, resample)

    def make(index: int) -> tuple[np.ndarray, int | None]:
        image = pixels(names[index], channels or (3 if like.shape[2] == 3 else None))
        if image.shape[2] != like.shape[2]:
            raise ValueError(
                f"{files.called(names[index])} has colours, but {files.called(names[0])}, the first image, is grey. "
                "Pass channels=3 to keep the colours or channels=1 to drop them."
            )
        if size is not None:
            image = resize(image, size, crop, resample)
        elif image.shape != like.shape:
            raise ValueError(
                f"{files.called(names[index])} has {_sides(image)} pixels, but {files.called(names[0])} has "
                f"{_sides(like)}. Pass size=... to bring all images to one size."
            )
        return image, None if numbers is None else int(numbers[index])

    def identity() -> str:
        how = repr((like.shape, size, crop, resample, channels)).encode()
        return digest([how, *(files.read(name) for name in names)])

    threads = usual_threads(threads, *first.shape[:2])
    labelled, count = numbers is not None, len(names)
    return hold(
        make, count, like, labelled, num_classes, threads=threads, memory=memory, report=report, identity=identity
    )


# ------------------------------------------------------------------------------------------- folders and zips


@dataclass(frozen=True)
class _Files:
    """The files of a folder or zip: sorted names (with "/"), the names of the images, and a way to read a file."""

    path: Path
    names: list[str]
    images: list[str]
    read: Callable[[str], bytes]  # from any thread

    def called(self, name: str) -> str:
        """A file's name in error messages."""
        return f"{self.path}/{name}"


def _open(path: Path) -> _Files:
    if not path.exists():
        raise FileNotFoundError(f"No folder or zip {path}. Give the path of a folder or zip of images.")
    names, read = _open_folder(path) if path.is_dir() else _open_zip(path)
    names.sort()
    return _Files(path, names, [name for name in names if _is_image(name)], read)


def _is_image(name: str) -> bool:
    hidden = "/." in f"/{name}" or "/__MACOSX/" in f"/{name}"
    return name.lower().endswith(SUFFIXES) and not hidden


def _open_folder(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    def read(name: str) -> bytes:
        try:
            return Path(f"{path}/{name}").read_bytes()
        except OSError as error:
            called = f"{path}/{name}"
            to = f"is a link to {os.readlink(called)}, which" if os.path.islink(called) else "cannot be opened and"
            what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise ValueError(f"{called} {to} {what}. Restore or remove it.") from error

    return _walk(path, "", ()), read


def _walk(folder: Path, below: str, above: tuple[Path, ...]) -> list[str]:
    """Names of all files below a folder; links are followed unless they lead back up."""
    here = folder.resolve()
    if here in above:
        return []
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                names += _walk(Path(entry.path), f"{below}{entry.name}/", (*above, here))
            else:
                names.append(below + entry.name)
    return names


def _open_zip(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    if not zipfile.is_zipfile(path):
        found = stand_in_of(path)
        raise ValueError(
            f"{path} is neither a folder nor a whole zip file{', but ' if found else ''}{found}. "
            "Give a folder of images, or a zip of one."
        )
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as a zip ({error}). Write or download it again.") from error
    entries = {_slashed(entry.filename): entry for entry in archive.infolist()}
    entries = {name: entry for name, entry in entries.items() if name and not name.endswith("/")}  # no folders
    size = path.stat().st_size
    lock = threading.Lock()  # opening an entry changes the archive object

    def read(name: str) -> bytes:
        entry, called = entries[name], f"{path}/{name}"
        if entry.file_size > MAX_FILE_BYTES:
            raise ValueError(
                f"{called} claims {entry.file_size} bytes, allowed are {MAX_FILE_BYTES}: no image is that large. "
                "Remove it from the zip."
            )
        if entry.header_offset + entry.compress_size > size:
            raise ValueError(f"{called} claims more bytes than the zip has. Write or download the zip again.")
        try:
            with lock:
                return archive.read(entry)
        except Exception as error:  # damaged or encrypted: each way of packing raises kinds of its own
            raise ValueError(f"{called} cannot be unpacked ({error}). Write or download the zip again.") from error

    return list(entries), read


def _slashed(name: str) -> str:
    """A name with "/" between its parts, where programs of Windows write a backslash, without parts "."."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part != ".")


# ---------------------------------------------------------------------------------------- what is in a folder


def _root(files: _Files, split: str | None) -> str:
    """The folder to read, "" or "name/": a split is looked for at the top and below folders that hold everything."""
    if not split:
        return ""
    split = split.strip("/") + "/"
    for root in (split, _shared_folder(files.images, "") + split):
        if any(name.startswith(root) for name in files.images):
            return root
    top = sorted({name.split("/")[0] for name in files.images if "/" in name})
    raise ValueError(
        f"{files.path} has no images below {split!r}.{near_matches(split[:-1], top)} "
        f"Folders there: {', '.join(top[:20]) or 'none'}."
    )


def _images(files: _Files, root: str) -> list[str]:
    """Names of the images below the root; says what was left out."""
    images = [name for name in files.images if name.startswith(root)]
    known = {*images, *(name for name in files.names if name.rpartition("/")[2] == "dataset.json")}
    others = [name for name in files.names if name.startswith(root) and name not in known]
    if not images:
        found = f"{len(others)} other files, such as {others[0]}" if others else "no files"
        raise ValueError(f"{files.path} holds no images ({', '.join(SUFFIXES)}), but {found}.")
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        warnings.warn(
            f"{len(others)} of the files of {files.path} are hidden or no images and were left out: {some}",
            stacklevel=3,
        )
    return images


def _shared_folder(names: list[str], root: str) -> str:
    """The deepest folder that holds all names, all of which begin with `root`."""
    shared = ""
    first, last = min(names, default=""), max(names, default="")  # folders that these two share, all share
    for one, other in zip(first.split("/")[:-1], last.split("/")[:-1], strict=False):
        if one != other:
            break
        shared += one + "/"
    return max(shared, root, key=len)


# ------------------------------------------------------------------------------------------------------ labels


def _labels(
    files: _Files, root: str, names: list[str], wanted: bool | None, classes: Sequence[str] | None
) -> tuple[np.ndarray | None, int]:
    """(labels [n] or None, number of classes) from dataset.json or else from folders."""
    if wanted is False:
        return None, 0
    inner = _shared_folder(names, root)
    for place in (root, inner):
        if place + "dataset.json" in files.names:
            numbers, count = _json_labels(files, place, names)
            break
    else:
        numbers, count = _folder_labels(files, root, inner, names, classes)
    if numbers is None and (wanted or classes):
        raise ValueError(
            f"{files.path} has no classes. Sort the images into one folder per class, or leave labels and classes out."
        )
    return numbers, count


def _folder_labels(
    files: _Files, root: str, inner: str, names: list[str], classes: Sequence[str] | None
) -> tuple[np.ndarray | None, int]:
    parts = [name[len(inner) :].split("/") for name in names]
    outside = [name for name, part in zip(names, parts, strict=True) if len(part) == 1]
    if len(outside) == len(names):
        return None, 0
    if outside:
        raise ValueError(
            f"{files.path} has images in class folders and {len(outside)} outside of them, such as {outside[0]}. "
            "Move them, or pass labels=False for a set without classes."
        )
    found = sorted({part[0] for part in parts})
    if not root and {name.lower() for name in found} <= SPLITS:
        raise ValueError(
            f"The folders {', '.join(found)} of {files.path} look like splits, not classes. "
            f"Pass split={found[-1]!r} to read one of them, or labels=False to read all without classes."
        )
    order = sorted({*found, *_classes_of_other_splits(files, root, inner)}) if classes is None else list(classes)
    unknown = [name for name in found if name not in order]
    if unknown:
        raise ValueError(
            f"{files.path} has class folders that `classes` does not name: {', '.join(unknown[:20])}. Add them."
        )
    number = {name: index for index, name in enumerate(order)}
    return np.array([number[part[0]] for part in parts], np.int32), len(order)


def _classes_of_other_splits(files: _Files, root: str, inner: str) -> set[str]:
    """Class folders of the splits beside `root`: a class that one split lacks must not shift the others' numbers."""
    if not root:
        return set()
    parent, within = root[: root.rstrip("/").rfind("/") + 1], inner[len(root) :]
    classes = set()
    for name in files.images:
        split, _, rest = name.removeprefix(parent).partition("/")
        if name.startswith(parent) and split.lower() in SPLITS and rest.startswith(within):
            folder, slash, _ = rest.removeprefix(within).partition("/")
            classes |= {folder} if slash else set()
    return classes


def _json_labels(files: _Files, place: str, names: list[str]) -> tuple[np.ndarray | None, int]:
    """Labels of EDM's dataset.json, {"labels": [[name, number], ...]}; null or absent there means no labels."""
    called = files.called(place + "dataset.json")
    try:
        listed = json.loads(files.read(place + "dataset.json")).get("labels")
        if listed is None:
            return None, 0
        number = {_slashed(name): label for name, label in listed}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{called} is not of the form {{"labels": [["name", 0], ...]}} ({error}). Correct it, or pass labels=False.'
        ) from error
    relative = [name[len(place) :] for name in names]
    missing = [name for name in relative if name not in number]
    if missing:
        raise ValueError(
            f"{called} has no label for {len(missing)} of {len(names)} images, such as {missing[0]}. "
            "Add them, or pass labels=False."
        )
    numbers = [number[name] for name in relative]
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**31 for n in numbers):
        raise ValueError(f"{called} has labels that are no whole numbers from 0. Correct it, or pass labels=False.")
    return np.array(numbers, np.int32), max(numbers) + 1


def _sides(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
