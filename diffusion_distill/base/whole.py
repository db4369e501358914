"""Files and folders that are there whole or not at all.

Everything is written beside its place first, under the name with `UNFINISHED` behind it, and renamed when it is
complete. A program that is killed at any moment leaves the old content or the new one. No rename replaces a folder that
is not empty, so an old folder is renamed with `REPLACED` behind its name until the new one is in its place; `recover`
takes it back after a program was killed between the two renames.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusion_distill.base.files import plain

UNFINISHED, REPLACED = ".unfinished", ".replaced"


@contextmanager
def whole(place: Path) -> Iterator[Path]:
    """Gives the path to write to, and puts what was written in its place when the block ends.

    Args:
      place: of a file or a folder; folders above it are made. What is there stays until the new content is complete,
        and stays for good if the block raises.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    half = unfinished(place)
    remove(half)
    try:
        yield half
        put(place)
    finally:
        remove(half)
    discard(replaced(place))


def write_json(place: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all; NumPy's and JAX's numbers become Python's."""
    text = json.dumps(content, indent=2, default=plain)
    with whole(place) as half:
        half.write_text(text + "\n", encoding="utf-8")


def unfinished(place: Path) -> Path:
    """Where what will stand at a place is written."""
    return place.with_name(place.name + UNFINISHED)


def replaced(place: Path) -> Path:
    """Where a folder stays that another one replaces."""
    return place.with_name(place.name + REPLACED)


def put(place: Path) -> None:
    """Moves what stands at `unfinished(place)` to its place; a folder that was there stays at `replaced(place)`."""
    if unfinished(place).is_dir() and place.exists():
        remove(replaced(place))
        os.replace(place, replaced(place))
    os.replace(unfinished(place), place)


def recover(place: Path) -> None:
    """Takes back a folder that was replaced by a program that was killed before the new one was in its place."""
    if replaced(place).exists() and not place.exists():
        os.replace(replaced(place), place)


def discard(path: Path) -> None:
    """Deletes what nothing needs any more. On a network disk what another program still reads cannot go: it stays."""
    with suppress(OSError):
        remove(path)


def remove(path: Path) -> None:
    """Deletes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
