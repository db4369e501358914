"""What users give as files: paths, folders to write to, JSON, and files that are not what they should be.

Every function that takes a path from outside calls `user_path` first. What ends with a result on disk calls `writable`
before its work begins. Readers that meet bytes they do not know ask `stand_in` what they are.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: How text is read that people may have edited: as UTF-8, with or without the byte-order mark that some editors put
#: before it. What is written has none.
EDITED = "utf-8-sig"


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, in which a leading `~` or `~name` stands for a home directory, as in a shell.

    Raises:
      ValueError: the path is empty, holds a zero byte, or is not valid UTF-8, so that no message could show it.
      TypeError: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"A path must be text or a pathlib.Path, got {path!r}.")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"A path must not be empty or hold a zero byte, got {text!r}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The path {text!a} is not valid UTF-8. Rename the file or folder.") from None
    return Path(os.path.expanduser(text))


def plain(value: Any) -> Any:
    """NumPy's and JAX's numbers and arrays as Python's, for `json.dumps(..., default=plain)`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} is neither a number, a text, nor a list or mapping of those.")


#: Why a folder cannot be made.
TAKEN = "there is a file of that name, or a link to nothing"


def writable(folder: str | os.PathLike[str], *files: str, folders: Sequence[str] = ()) -> Path:
    """Makes a folder for results and tries to write there, so that work whose results cannot be kept never begins.

    Args:
      files: names of the files that will be written there, which must not be folders.
      folders: names of the folders that will be written there, which must not be files or links to nothing.

    Raises:
      ValueError: the folder cannot be made or written, one of the files is a folder, or one of the folders a file.
    """
    place = user_path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        taken = isinstance(error, FileExistsError)
        reason = TAKEN if taken else error.strerror or error
        raise ValueError(
            f"Cannot write to {place}: {reason}. Choose another folder, change its permissions, or free some space."
        ) from error
    for name in files:
        if (place / name).is_dir():
            raise ValueError(f"Cannot write the file {place / name}: there is a folder of that name. Move it away.")
    for name in folders:
        if os.path.lexists(place / name) and not (place / name).is_dir():
            raise ValueError(f"Cannot write the folder {place / name}: {TAKEN}. Move it away.")
    return place


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      advice: what to do about a file that is not whole, the end of each message.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. {advice}")
    content = path.read_bytes()
    try:
        found = json.loads(content)  # bytes: by their mark, UTF-16 of Windows too
    except (ValueError, RecursionError) as error:
        reason = f"it is {stand_in(content)}" if stand_in(content) else f"it is damaged or cut short ({error})"
        raise ValueError(f"{path} cannot be read: {reason}. {advice}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} where a JSON object is needed. {advice}")
    return found


#: First bytes (in lower case, without leading blanks) of what stands in the place of a file -> what it is, what to do.
STAND_INS: dict[bytes, str] = {
    b"<!doctype html": "an HTML page, which a server sends where it does not send the file: download the file again",
    b"<html": "an HTML page, which a server sends where it does not send the file: download the file again",
    b"<?xml": "an XML page, perhaps the error message of a server: download the file again",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file: fetch the file with `git lfs pull`",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"rar!": "a RAR archive: unpack it first",
}


def stand_in(begin: bytes) -> str:
    """The kind of file that the first bytes show, if not the expected one, and advice; "" if unknown."""
    if not begin:
        return "empty: copy or download it again"
    start = begin[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((said for first, said in STAND_INS.items() if start.startswith(first)), "")


def stand_in_of(path: Path) -> str:
    """`stand_in` of a file, which also knows archives that were cut short and pickles."""
    with open(path, "rb") as file:
        begin = file.read(200)
    if begin.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return "an archive whose end is missing, so it was cut short: copy or download it again"
    if begin[:1] == b"\x80" and begin[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which is a program; this library runs none"
    return stand_in(begin)
