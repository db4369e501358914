"""A folder with parameters and the JSON files that describe them, which is there whole or not at all.

FOLDER/params/            parameters (Orbax)
FOLDER/<name>.json        what describes them; one holds their checksum, see `training.checksum.fingerprint`

A folder that replaces another is written beside it first and then takes its place. Until the last description has
changed too, the old parameters stay in FOLDER/params.replaced, so that a program that is killed at any moment leaves
the one or the other, and a program that reads meanwhile gets one of them: the checksum says which parameters belong to
the description.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from diffusion_distill.base.files import read_json, writable
from diffusion_distill.base.typing import Params
from diffusion_distill.base.whole import discard, put, recover, remove, replaced, unfinished, write_json
from diffusion_distill.training.checkpoint import ADVICE, load_params, save_params
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.version import __version__

PARAMS = "params"
#: How often a folder that is being written is read, with a pause in seconds.
READS, PAUSE = 20, 0.1
#: What each folder says about the programs that wrote it.
VERSIONS = {"diffusion_distill": __version__, "jax": jax.__version__}

Found = TypeVar("Found")


def check_place(folder: Path, names: Iterable[str]) -> None:
    """Looks whether a folder can be written, for those who work long before they write it; makes none.

    Args:
      names: of the JSON files.

    Raises:
      ValueError: a file, or a link to nothing, stands in the place of the folder or of its parameters, a folder in
        that of a JSON file, or what is there may not be written.
    """
    if os.path.lexists(folder):
        writable(folder, *names, folders=[PARAMS])


def write(folder: Path, params: Params, descriptions: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes a folder in place of one that is there; every process of a run calls it.

    Args:
      descriptions: the content of each JSON file by its name. They are written in their order, and the last one holds
        the checksum.

    Raises:
      ValueError: as `check_place`.
    """
    check_place(folder, descriptions)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / PARAMS
    save_params(unfinished(place), params)
    if jax.process_index() == 0:
        _take_back(folder, list(descriptions)[-1], params)
        put(place)
        for name, content in descriptions.items():
            write_json(folder / name, content)
        discard(replaced(place))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"written {folder}")
    return folder


def read(folder: Path, names: Sequence[str], reader: Callable[[], Found]) -> Found:
    """What `reader` finds in a folder, which is read again if it cannot be read while another program writes it.

    Args:
      names: of the JSON files.
      reader: raises OSError, ValueError or TypeError where the parts do not fit each other.
    """
    for _ in range(READS - 1):
        before = _state(folder, names)
        try:
            return reader()
        except (OSError, ValueError, TypeError):
            if _state(folder, names) == before and not unfinished(folder / PARAMS).exists():
                raise  # nobody else is writing it
            time.sleep(PAUSE)
    return reader()


def params_in(folder: Path, like: Any, checksum: str | None) -> Params:
    """The parameters in a folder with the checksum that its description names; None takes any.

    Args:
      like: their shapes and types, see `checkpoint.load_params`.

    Raises:
      FileNotFoundError: there are none.
      ValueError: they are damaged, do not fit `like`, or have changed since they were written.
    """
    try:
        return _checked(folder / PARAMS, like, checksum)
    except (OSError, ValueError):
        if not replaced(folder / PARAMS).exists():
            raise
        return _checked(replaced(folder / PARAMS), like, checksum)


def _take_back(folder: Path, name: str, like: Params) -> None:
    """Puts the old parameters in their place again if a program was killed before their description was replaced too.

    `put` would replace them for good, and those in their place have no description.
    """
    place = folder / PARAMS
    if not replaced(place).exists():
        return
    try:
        checksum = read_json(folder / name, ADVICE).get("fingerprint")
        _checked(replaced(place), like, checksum)
    except (OSError, ValueError):
        return
    if checksum is None:  # nothing says whose the parameters are
        return
    remove(place)
    recover(place)


def _checked(place: Path, like: Any, checksum: str | None) -> Params:
    params = load_params(place, like)
    if checksum not in (None, fingerprint(params)):
        raise ValueError(f"The parameters in {place} have changed since they were written: the disk or a copy failed.")
    return params


def _state(folder: Path, names: Sequence[str]) -> list[tuple[int, int] | None]:
    """What changes while a folder is written."""
    return [_identity(folder / name) for name in (PARAMS, replaced(Path(PARAMS)), *names)]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except OSError:
        return None
