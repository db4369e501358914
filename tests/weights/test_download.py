"""Downloads are resumed, checked and pinned; whatever may not be whole is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from weight_files import files_in

from diffusion_distill.weights import (
    PUBLISHED,
    WeightsError,
    download,
    fetch,
)


@dataclass
class Site:
    """A server of one file, with what it does wrong."""

    content: bytes
    etag: str = '"one"'
    ranges: bool = True  # answers Range requests
    if_range: bool = True  # minds If-Range
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    status: int = 0  # answers with this error
    location: str = ""  # redirects there
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, asked, condition = self.site, self.headers["Range"], self.headers["If-Range"]
        site.asked.append(asked)
        if site.status or site.location:
            self.send_response(site.status or 302)
            self.send_header("Location", site.location)
            self.end_headers()
            return
        partial = bool(asked and site.ranges and not (site.if_range and condition not in (None, site.etag)))
        begin = int(asked[6:-1]) if asked and partial else 0
        if begin and begin >= len(site.content):
            self.send_response(416)
            self.end_headers()
            return
        body = site.content[begin:]
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {begin}-{len(site.content) - 1}/{len(site.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", site.etag)
        self.end_headers()
        self.wfile.write(body[: site.cuts.pop(0)] if site.cuts else body)


CONTENT = np.random.default_rng(0).bytes(100_000)
OTHER = np.random.default_rng(1).bytes(90_000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    site = Site(CONTENT)
    server = HTTPServer(("127.0.0.1", 0), type("OneSite", (Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}/folder/cifar_1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


DONE = ["cifar_1", "cifar_1.json"]


@pytest.mark.fast
def test_download_reports_pins_and_leaves_nothing_else(site: Site, tmp_path: Path) -> None:
    reports: list[tuple[int, int | None]] = []
    found = fetch(site.url, tmp_path / "new", report=lambda done, total: reports.append((done, total)))
    assert found == (tmp_path / "new" / "cifar_1", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    assert found.path.read_bytes() == CONTENT
    assert reports[-1] == (len(CONTENT), len(CONTENT))
    assert files_in(tmp_path / "new") == DONE
    pin = json.loads((tmp_path / "new" / "cifar_1.json").read_text())
    assert pin == {"url": site.url, "size": len(CONTENT), "sha256": found.sha256}
    assert fetch(site.url, tmp_path / "new", size=len(CONTENT), sha256=found.sha256) == found
    assert len(site.asked) == 1  # found, not fetched again


@pytest.mark.fast
@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(site: Site, tmp_path: Path, ranges: bool) -> None:
    site.ranges, site.cuts = ranges, [40_000, 20_000]
    assert fetch(site.url, tmp_path).path.read_bytes() == CONTENT
    second = 60_000 if ranges else 20_000  # without ranges each answer begins at the beginning
    assert site.asked == [None, "bytes=40000-", f"bytes={second}-"]
    assert files_in(tmp_path) == DONE


@pytest.mark.fast
def test_after_too_many_interruptions_the_next_call_goes_on(site: Site, tmp_path: Path) -> None:
    site.cuts = [10_000] * download.ATTEMPTS
    with pytest.raises(WeightsError, match="the next call goes on"):
        fetch(site.url, tmp_path)
    assert len(site.asked) == download.ATTEMPTS
    assert fetch(site.url, tmp_path).path.read_bytes() == CONTENT
    assert site.asked[-1] == "bytes=30000-"


@pytest.mark.fast
@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("new", [OTHER, OTHER[:5000]])
def test_two_versions_of_a_file_are_never_mixed(site: Site, tmp_path: Path, if_range: bool, new: bytes) -> None:
    site.cuts = [10_000] * download.ATTEMPTS
    with pytest.raises(WeightsError):
        fetch(site.url, tmp_path)
    site.content, site.etag, site.if_range = new, '"two"', if_range
    assert fetch(site.url, tmp_path).path.read_bytes() == new
    assert files_in(tmp_path) == DONE


@pytest.mark.fast
def test_a_complete_part_is_used(site: Site, tmp_path: Path) -> None:
    found = fetch(site.url, tmp_path)
    found.path.rename(tmp_path / "cifar_1.part")
    (tmp_path / "cifar_1.json").unlink()
    record = {"url": site.url, "total": len(CONTENT), "validator": site.etag}
    (tmp_path / "cifar_1.part.json").write_text(json.dumps(record))
    assert fetch(site.url, tmp_path) == found
    assert len(site.asked) == 1


@pytest.mark.fast
@pytest.mark.parametrize("expected", [{"sha256": "0" * 64}, {"size": 99_999}, {"size": 100_001}])
def test_another_file_than_expected_is_refused(site: Site, tmp_path: Path, expected: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="expected"):
        fetch(site.url, tmp_path, **expected)
    assert files_in(tmp_path) == []


@pytest.mark.fast
def test_a_pinned_file_must_stay_the_same(site: Site, tmp_path: Path) -> None:
    found = fetch(site.url, tmp_path)
    found.path.write_bytes(OTHER)
    with pytest.raises(WeightsError, match=r"changed or damaged. Delete"):
        fetch(site.url, tmp_path)
    found.path.unlink()
    site.content = CONTENT[:-1] + b"?"
    with pytest.raises(WeightsError, match=r"sha256 .* is expected.*cifar_1\.json"):
        fetch(site.url, tmp_path)
    assert files_in(tmp_path) == ["cifar_1.json"]
    site.content = CONTENT
    assert fetch(site.url, tmp_path) == found
    with pytest.raises(WeightsError, match="pins sha256"):
        fetch(site.url, tmp_path, sha256="0" * 64)
    with pytest.raises(WeightsError, match="pins a file from"):
        fetch(site.url.replace("folder", "elsewhere"), tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/file",
        "ftp://example.com/file",
        "file:///etc/passwd",
        "https://example.com/",
        "https://e.com/.x",
    ],
)
def test_addresses_that_are_not_fetched(url: str, tmp_path: Path) -> None:
    def never(*args: Any, **options: Any) -> None:
        pytest.fail("a connection was opened")

    with pytest.raises(WeightsError, match=r"not fetched|does not end"):
        fetch(url, tmp_path, opener=never)


@pytest.mark.fast
@pytest.mark.parametrize("location", ["http://example.com/cifar_1", "file:///etc/passwd"])
def test_redirections_are_checked(site: Site, tmp_path: Path, location: str) -> None:
    site.location = location
    with pytest.raises(WeightsError, match=r"not fetched|Could not download"):
        fetch(site.url, tmp_path)
    assert len(site.asked) == 1


@pytest.mark.fast
@pytest.mark.parametrize(("status", "calls"), [(404, 1), (403, 1), (503, 3)])
def test_errors_of_the_server(site: Site, tmp_path: Path, status: int, calls: int) -> None:
    site.status = status
    with pytest.raises(WeightsError, match=f"{site.url}.*{status}.*path of the file"):
        fetch(site.url, tmp_path)
    assert len(site.asked) == calls


def answers(headers: dict[str, str], body: list[bytes], pause: float = 0.0) -> Any:
    """An opener whose server sends these headers and pieces, then closes the connection."""

    def serve(connection: socket.socket) -> None:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode())
        with contextlib.suppress(OSError):  # the client has had enough
            for piece in body:
                connection.sendall(piece)
                time.sleep(pause)
        connection.close()

    def opener(request: Any, timeout: float) -> Any:
        ours, theirs = socket.socketpair()
        threading.Thread(target=serve, args=(theirs,), daemon=True).start()
        response = HTTPResponse(ours)
        ours.close()  # the response has a file of its own
        response.begin()
        return response

    return opener


CHUNKS = [b"%x\r\n%s\r\n" % (len(part), part) for part in (CONTENT[:70_000], CONTENT[70_000:], b"")]
ADDRESS = "https://example.com/cifar_1"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ({"Content-Encoding": "gzip", "Content-Length": "100000"}, [CONTENT], "encoding 'gzip'"),
        ({}, [CONTENT[:5000]], "how long"),
        ({"Content-Length": "9" * 5000}, [CONTENT], "how long"),
        ({"Transfer-Encoding": "chunked"}, CHUNKS[:1], "Could not download"),
        ({"Content-Length": "100000"}, [CONTENT[:5000]], "ended early"),
    ],
)
def test_a_transfer_that_may_not_be_whole_is_not_pinned(
    headers: dict[str, str], body: list[bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with pytest.raises(WeightsError, match=message):
        fetch(ADDRESS, tmp_path, opener=answers(headers, body))
    assert not {"cifar_1", "cifar_1.json"} & set(files_in(tmp_path))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("headers", "body", "known"),
    [
        ({"Transfer-Encoding": "chunked"}, CHUNKS, {}),
        ({}, [CONTENT], {"size": len(CONTENT)}),
        ({}, [CONTENT], {"sha256": hashlib.sha256(CONTENT).hexdigest()}),
    ],
)
def test_a_transfer_without_a_length_whose_end_is_known(
    headers: dict[str, str], body: list[bytes], known: dict[str, Any], tmp_path: Path
) -> None:
    assert fetch(ADDRESS, tmp_path, opener=answers(headers, body), **known).path.read_bytes() == CONTENT


@pytest.mark.fast
def test_a_server_that_sends_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 0.02)
    drip = answers({"Content-Length": "100000"}, [b"x"] * 100_000, pause=0.005)
    with pytest.raises(WeightsError, match=r"only \d+ bytes"):
        fetch(ADDRESS, tmp_path, opener=drip)


@pytest.mark.fast
def test_a_part_without_a_version_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    site.etag, site.cuts = "", [10_000]
    assert fetch(site.url, tmp_path).path.read_bytes() == CONTENT
    assert site.asked == [None, None]


@pytest.mark.fast
def test_two_downloads_of_one_file_wait_for_each_other(site: Site, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: fetch(site.url, tmp_path), range(4)))
    assert len(found) == len(site.asked) == 1
    assert files_in(tmp_path) == DONE


@pytest.mark.fast
def test_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    calls = []

    def offline(request: Any, timeout: float) -> None:
        calls.append(request.full_url)
        raise URLError("Name or service not known")

    url = PUBLISHED["cifar_1"].url
    with pytest.raises(WeightsError, match=f"{url}.*not known.*give the path of the file"):
        fetch(url, tmp_path, opener=offline)
    assert calls == [url] * download.ATTEMPTS


def test_a_file_is_read_once_before_it_is_pinned(site: Site, tmp_path: Path) -> None:
    """A page of a login, sent with status 200, is not kept; without it the same call gives the file."""

    def check(path: Path) -> None:
        if path.read_bytes() != CONTENT:
            raise WeightsError("no file of weights")

    site.content = b"<html>log in</html>"
    with pytest.raises(WeightsError, match="no file of weights"):
        fetch(site.url, tmp_path, check=check)
    assert not list(tmp_path.iterdir())
    site.content = CONTENT
    assert fetch(site.url, tmp_path, check=check).path.read_bytes() == CONTENT
    assert fetch(site.url, tmp_path, check=lambda path: pytest.fail("it is pinned")).size == len(CONTENT)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 5000])
def test_a_damaged_record_of_a_part_begins_it_anew(content: bytes, site: Site, tmp_path: Path) -> None:
    (tmp_path / "cifar_1.part").write_bytes(b"something else")
    (tmp_path / "cifar_1.part.json").write_bytes(content)
    assert fetch(site.url, tmp_path).path.read_bytes() == CONTENT


def test_an_empty_file_is_not_pinned(site: Site, tmp_path: Path) -> None:
    site.content = b""
    with pytest.raises(WeightsError, match="is empty"):
        fetch(site.url, tmp_path)
    assert not list(tmp_path.iterdir())
