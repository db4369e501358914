"""Downloads of published files: over HTTPS, resumed where they stopped, checked, and pinned.

    FOLDER/NAME             the file, there only when complete and checked
    FOLDER/NAME.json        the pin: url, size, sha256; later downloads must give the same
    FOLDER/NAME.part        what has arrived so far
    FOLDER/NAME.part.json   the version of the file that it belongs to: url, total size, validator (ETag or date)
    FOLDER/NAME.lock        held by the process that downloads; another one waits and then finds the file

Where no hash has been published, the hash of the first download is recorded in the pin. So a file whose end is unknown
is not pinned: the server must announce the length, or send in chunks, unless size or hash are known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import EDITED, user_path
from diffusion_distill.base.whole import write_json

#: (bytes that are here, bytes in all or None if the server does not say)
Report = Callable[[int, int | None], None]

ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt, twice that before the third
TIMEOUT = 60.0  # seconds without a byte, or with fewer than SLOWEST bytes per second
SLOWEST = 1024
CHUNK = 2**20
MAX_DIGITS = 18  # of a length
LOCAL = ("localhost", "127.0.0.1")
BY_HAND = "Without a network, download it elsewhere and give the path of the file instead of its name."


class Fetched(NamedTuple):
    """A file that is here and checked."""

    path: Path
    sha256: str
    size: int


def fetch(
    url: str,
    folder: str | Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    report: Report | None = None,
    opener: Callable[..., Any] | None = None,
    check: Callable[[Path], object] | None = None,
) -> Fetched:
    """Downloads a file, or finds it in the folder, and checks it.

    Args:
      url: https; http on this machine only.
      size, sha256: of the file, if known; otherwise those of the pin, if there is one.
      report: called as the bytes arrive.
      opener: called as opener(request, timeout=seconds) in the place of urllib's.
      check: called with a file of which no hash is known, before it is pinned; raises WeightsError if it is not what
        was meant, such as the page of a login. Then it is deleted.

    Raises:
      WeightsError: another kind of address, no connection, or a file that differs from what is known or pinned.
      OSError: the folder cannot be written.
    """
    _check_address(url)
    target = user_path(folder) / _name(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_name(f"{target.name}.lock")):
        return _fetch(url, target, {"size": size, "sha256": sha256}, report, opener, check or (lambda path: None))


def _fetch(
    url: str,
    target: Path,
    known: dict[str, Any],
    report: Report | None,
    opener: Callable[..., Any] | None,
    check: Callable[[Path], object],
) -> Fetched:
    beside = target.with_name(f"{target.name}.json")
    pin = _read_json(beside)
    if pin and pin.get("url") != url:
        raise WeightsError(f"{beside} pins a file from {pin.get('url')}, not from {url}. Choose another folder.")
    for what, value in known.items():
        if value is not None and pin.get(what, value) != value:
            raise WeightsError(f"{beside} pins {what} {pin[what]}, not {value}. Delete it if it is wrong.")
        known[what] = pin.get(what, value)
    if target.exists():
        found = _checked(target, url, known, f"Delete {target} to download it again.")
        if not pin:
            _pin(beside, url, found, known, check)
        return found
    part = target.with_name(f"{target.name}.part")
    _download(url, part, known, report or (lambda done, total: None), opener or _OPENER)
    try:
        if not part.stat().st_size:
            raise WeightsError(f"{url} is empty. {BY_HAND}")
        found = _checked(part, url, known, f"If the change is meant, delete {beside} and fetch it again.")
    except WeightsError:
        _forget(part)
        raise
    os.replace(part, target)
    _record(part).unlink(missing_ok=True)
    found = found._replace(path=target)
    try:
        _pin(beside, url, found, known, check)
    except WeightsError:
        target.unlink()  # the next call downloads it again
        raise
    return found


def _pin(beside: Path, url: str, found: Fetched, known: dict[str, Any], check: Callable[[Path], object]) -> None:
    """Writes down what a file is, which is checked first if no hash says it."""
    if known["sha256"] is None:
        check(found.path)
    write_json(beside, {"url": url, "size": found.size, "sha256": found.sha256})


# ---------------------------------------------------------------- the transfer


def _download(url: str, part: Path, wanted: dict[str, Any], report: Report, opener: Callable[..., Any]) -> None:
    """Fills `part`, in a few attempts."""
    reason: object = "the connection ended early"
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * attempt)
        try:
            if _attempt(url, part, wanted, report, opener):
                return
        except HTTPError as error:
            error.close()
            reason = error
            if error.code < 500:  # asking again does not help
                break
        except (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException) as error:
            reason = error
    kept = f"What has arrived is kept in {part}; the next call goes on from there. " if part.exists() else ""
    raise WeightsError(f"Could not download {url}: {reason}. {kept}{BY_HAND}")


def _attempt(url: str, part: Path, wanted: dict[str, Any], report: Report, opener: Callable[..., Any]) -> bool:
    """One request for what is missing; returns whether all is here."""
    size = wanted["size"]
    known = _known_of(part)
    done = part.stat().st_size if known.get("url") == url else 0
    if done and done == known.get("total"):
        return True
    validator = known.get("validator")
    if not validator and wanted["sha256"] is None:
        done = 0  # nothing would tell whether the file has changed between the two parts
    headers = {"Accept-Encoding": "identity", "User-Agent": "diffusion_distill"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if validator and not validator.startswith("W/"):
            headers["If-Range"] = validator
    try:
        response = opener(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        _forget(part)  # the server's file is shorter than what is here
        return False
    with response:
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise WeightsError(
                f"{url} is sent with the encoding {encoding!r}, although the file as it is was asked for. {BY_HAND}"
            )
        here = _version(url, response)
        resumed = response.status == 206
        if resumed and (_first_byte(response) != done or here != known):
            _forget(part)  # another file by now, or another part of it: begin again
            return False
        chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"  # has an end of its own
        if here["total"] is None and not chunked and wanted == {"size": None, "sha256": None}:
            raise WeightsError(
                f"The server of {url} does not say how long the file is, so nobody could tell whether all of it came. "
                f"{BY_HAND}"
            )
        if size is not None and here["total"] not in (None, size):
            raise WeightsError(f"{url} has {here['total']} bytes, but {size} are expected. Was the file changed?")
        done = done if resumed else 0
        with open(part, "ab" if resumed else "wb") as file:
            write_json(_record(part), here)  # after the old content is gone
            pace = _Pace()
            while chunk := response.read1(CHUNK):
                pace.check(len(chunk))
                done += len(chunk)
                if size is not None and done > size:
                    raise WeightsError(f"{url} has more than the {size} bytes that are expected. Was the file changed?")
                file.write(chunk)
                report(done, here["total"])
    return here["total"] in (None, done)


class _Pace:
    """Refuses a server that sends next to nothing, which no time-out of a socket sees."""

    def __init__(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def check(self, arrived: int) -> None:
        """Counts bytes; raises TimeoutError after TIMEOUT seconds with fewer than SLOWEST per second."""
        self._bytes += arrived
        seconds = time.monotonic() - self._since
        if seconds < TIMEOUT:
            return
        if self._bytes < SLOWEST * seconds:
            raise TimeoutError(f"only {self._bytes} bytes in {seconds:.0f} s")
        self._since, self._bytes = time.monotonic(), 0


def _version(url: str, response: Any) -> dict[str, Any]:
    """Which version of the file an answer belongs to."""
    headers = response.headers
    of_part = headers.get("Content-Range", "").rpartition("/")[2]
    whole = of_part if response.status == 206 else headers.get("Content-Length", "")
    total = int(whole) if whole.isdecimal() and len(whole) <= MAX_DIGITS else None
    return {"url": url, "total": total, "validator": headers.get("ETag") or headers.get("Last-Modified")}


def _first_byte(response: Any) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found and len(found[1]) <= MAX_DIGITS else None


class _SafeRedirects(HTTPRedirectHandler):
    """Follows a redirection only to addresses that could have been asked for."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            _check_address(newurl)
        except WeightsError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = build_opener(_SafeRedirects).open


# ---------------------------------------------------------------- checks and files


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process downloads the same file."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, lock):
                continue  # the process before this one has removed it
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise WeightsError(f"{url[:200]!r} is no address: {error}.") from error
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOCAL):
        raise WeightsError(f"{url} is not fetched: only https addresses are.")


def _name(url: str) -> str:
    """The last part of an address, as the name of a file."""
    name = unquote(urlsplit(url).path.rstrip("/").rpartition("/")[2])
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise WeightsError(f"{url} does not end with the name of a file.")
    return name


def _checked(path: Path, url: str, known: dict[str, Any], advice: str) -> Fetched:
    """The file with its size and hash; an error if they differ from the known ones."""
    with open(path, "rb") as file:
        found = Fetched(path, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
    for what in ("size", "sha256"):
        if known[what] not in (None, getattr(found, what)):
            raise WeightsError(
                f"{path}, from {url}, has {what} {getattr(found, what)}, but {known[what]} is expected: the file was "
                f"changed or damaged. {advice}"
            )
    return found


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _record(part).unlink(missing_ok=True)


def _known_of(part: Path) -> dict[str, Any]:
    """The version that a part belongs to; {} if there is no part, or its record is damaged: then it begins again."""
    try:
        return _read_json(_record(part)) if part.exists() else {}
    except WeightsError:
        return {}


def _record(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a record; {} if there is none."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding=EDITED))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: {error}. Delete it.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is damaged: it holds no JSON object. Delete it.")
    return content
