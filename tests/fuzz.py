"""Reads damaged copies of small valid files, thousands of them: each is read, or refused by the error that is promised.

    python tests/fuzz.py --format=NAME|all --minutes=1 [--seed=0] [--count=N]

A copy is made by a few random changes: bits turned, bytes set to telling values, parts cut, doubled, moved or zeroed,
numbers of 4 and 8 bytes made huge, words and numbers of texts put in. Of archives every other copy has the changes
within an entry and is archived anew, since checksums would keep readers from what is inside. Files lie in memory where
there is a folder for that: 2000 to 10000 a second. Watched are the kind of error, its message (it names the file), the
seconds of each reading, and, by an audit hook, whether a reading starts a program, imports a module, opens another file
for writing or reaches for the network. The memory of a reading is watched in one of `ROUNDS` rounds, because it makes a
reading take three times as long. Nothing outside the standard library and NumPy is needed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import msgpack  # noqa: E402
import numpy as np  # noqa: E402
import safetensors_files  # noqa: E402
import snapshots  # noqa: E402
import torch_files  # noqa: E402
import toys  # noqa: E402

from diffusion_distill import NETWORKS, data, weights  # noqa: E402
from diffusion_distill.base.errors import WeightsError  # noqa: E402
from diffusion_distill.base.files import read_json  # noqa: E402
from diffusion_distill.denoisers.model import Model  # noqa: E402
from diffusion_distill.evaluation import read_reference  # noqa: E402
from diffusion_distill.formats import flax_file, graph_def, safetensors_file, torch_pickle, torch_save  # noqa: E402
from diffusion_distill.solvers.fitted import FittedSolver  # noqa: E402
from diffusion_distill.training.artefact import _described  # noqa: E402
from diffusion_distill.training.logs import read_figures  # noqa: E402
from diffusion_distill.weights import exchange, state_dict  # noqa: E402

ARRAYS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32)}
MODEL = {"network": "perceptron", "out_ch": 1}
SECONDS, MEMORY, PER_BYTE = 10.0, 100 * 2**20, 2.5
#: Memory is watched in the first of so many rounds of so many readings each, then again.
ROUNDS, ROUND = 8, 1000
#: A folder that lies in memory: files on a disk take longer to write than to read.
IN_MEMORY = Path("/dev/shm")
#: What a reader of a file has no reason to do.
FORBIDDEN = ("exec", "subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "pickle.find_class")

#: Where Python itself makes functions of text.
LIBRARY = ("dataclasses.py", "collections/__init__.py", "inspect.py")


class Format(NamedTuple):
    """A valid file, how it is read, and the errors that are promised."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (WeightsError,)
    name: str = "file"


def _model() -> Model:
    NETWORKS["perceptron"] = toys.Perceptron
    return Model(toys.Perceptron(1), (2, 2, 1), prediction="v")


def _flax(path: Path) -> None:
    array = lambda a: msgpack.ExtType(1, msgpack.packb((a.shape, a.dtype.name, a.tobytes())))  # noqa: E731
    path.write_bytes(msgpack.packb({"step": 3, "params": {name: array(a) for name, a in ARRAYS.items()}}))  # type: ignore[arg-type]


def _snapshot(path: Path) -> None:
    network = snapshots.network("SongUNet", {"img_resolution": 8}, {"dec.0.weight": ARRAYS["a.weight"]})
    snapshots.write(path, snapshots.snapshot(snapshots.wrapped("EDMPrecond", {"img_resolution": 8}, network, {})))


def _exported(path: Path) -> None:
    model = _model()
    arrays = {name: np.ones(shape, np.float32) for name, shape in weights.shapes_of(model).items()}
    header: dict[str, Any] = safetensors_files.header_of(arrays)
    about = {"model": model.to_dict(), "steps": 1, "provenance": {}, "grid": None}
    header["__metadata__"] = {exchange.KEY: json.dumps(about)}
    path.write_bytes(safetensors_files.joined(header, b"".join(array.tobytes() for array in arrays.values())))


#: Following a network through JAX takes 30 times as long as all else, and most copies describe the same one.
_shapes_of = lru_cache(maxsize=100)(weights.shapes_of)


def _read_export(path: Path) -> None:
    with mock.patch.object(exchange, "shapes_of", _shapes_of):
        exchange.read(path)


def _npz(path: Path) -> None:
    np.savez_compressed(path, mu=np.zeros(3), sigma=np.eye(3))


def _images(path: Path) -> None:
    np.savez(path, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))


def _png_zip(path: Path) -> None:
    from PIL import Image

    with zipfile.ZipFile(path, "w") as archive:
        for k in range(3):
            with archive.open(f"{k}.png", "w") as file:
                Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)).save(file, "png")


def _fitted(path: Path) -> None:
    level = {"alpha": [0.1, 0.6, 1.0], "sigma": [0.99, 0.8, 0.0]}
    content = {"format": 1, "solver": "ddim", "process": {"name": "cosine"}, "grid": level, "lambdas": [[0.1], [0.2]]}
    content |= {"distance from the teacher": {"plain": [1.0, 1.0], "fitted": [0.5, 0.5]}, "provenance": {}}
    path.write_text(json.dumps(content | {"search": None}))


def _described_model(path: Path) -> None:
    path.write_text(json.dumps({"model": _model().to_dict(), "steps": 0, "grid": None, "fingerprint": "00"}))


def _metrics(path: Path) -> None:
    path.write_text("".join(json.dumps({"update": k, "loss": 0.5, "seconds": {"data": 1}}) + "\n" for k in range(9)))


def _images_of(path: Path) -> None:
    source = data.folder(path)
    source.gather(np.arange(len(source)))


VALUES = (ValueError, TypeError, OSError)
FORMATS = {
    "flax": Format(_flax, flax_file.read),
    "safetensors": Format(lambda path: safetensors_files.write(path, ARRAYS), safetensors_file.read),
    "export": Format(_exported, _read_export),
    "torch-zip": Format(
        lambda path: torch_files.write_zip(path, torch_files.state_dict(ARRAYS)), torch_save.read_object
    ),
    "torch-legacy": Format(
        lambda path: torch_files.write_legacy(path, torch_files.state_dict(ARRAYS)), torch_save.read_object
    ),
    "torch-script": Format(lambda path: torch_files.write_script(path, ARRAYS), torch_save.read),
    "state-dict": Format(lambda path: torch_files.write_zip(path, torch_files.state_dict(ARRAYS)), state_dict.read),
    "snapshot": Format(_snapshot, torch_pickle.read),
    "graph": Format(lambda path: torch_files.write_graph(path, ARRAYS), graph_def.read),
    "reference": Format(_npz, read_reference, VALUES, "file.npz"),
    "npz": Format(_images, data.npz, VALUES, "file.npz"),
    "image-zip": Format(_png_zip, _images_of, VALUES, "file.zip"),
    "solver": Format(_fitted, FittedSolver.load, VALUES, "file.json"),
    "model": Format(
        _described_model, lambda path: _described(path, read_json(path, ""), None), VALUES, "model.json"
    ),
    "metrics": Format(_metrics, read_figures, (), "metrics.jsonl"),
}  # fmt: skip


# ---------------------------------------------------------------- changes

TELLING = (0, 1, 0x7F, 0x80, 0xFF)
HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
#: What texts, such as JSON and the headers of arrays, may hold in place of something else.
WORDS = (
    b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"0.5", b"[]", b"{}", b'""', b"[" * 2000,
    b'{"a":' * 500, b"../../x", b"/etc/passwd", b"\\u0000", b"\xff\xfe", b"object", b">f8",
    *(str(number).encode() for number in HUGE),
)  # fmt: skip
NUMBER = re.compile(rb"\d+")


def changed(content: bytes, chance: random.Random) -> bytes:
    """A copy with one to four changes."""
    found = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at, length = chance.randrange(len(found) + 1), chance.choice([1, 2, 4, 8, 16, 64, 256])
        kind = chance.randrange(10)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = chance.choice(TELLING)
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[at : at + length] * chance.choice([1, 2, 50])
        elif kind == 4:
            found[at : at + length] = bytes(length)
        elif kind == 5:
            form, number = chance.choice(["<I", ">I", "<Q", ">Q"]), chance.choice(HUGE)
            packed = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
            found[at : at + len(packed)] = packed
        elif kind == 6:
            del found[at:]
        elif kind == 7:
            found[at : at + chance.choice([0, length])] = chance.choice(WORDS)
        elif kind == 8 and (number := NUMBER.search(found, at)):
            found[number.start() : number.end()] = chance.choice(WORDS)
        else:
            other = chance.randrange(len(found) + 1)
            found[at : at + length] = found[other : other + length]
        found = found or bytearray(b"\0")
    return bytes(found)


def changed_inside(content: bytes, chance: random.Random) -> bytes:
    """A copy of a zip archive with such changes in one of its entries, and with the checksums of what it holds."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        chosen = chance.choice(old.infolist())
        for entry in old.infolist():
            within = old.read(entry)
            new.writestr(entry, changed(within, chance) if entry is chosen else within)
    return made.getvalue()


# ---------------------------------------------------------------- watching

_watching: list[str] = []
_watched = False


def _hook(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    if event in FORBIDDEN and not (event == "exec" and _by_import()):
        _watching.append(f"{event} {str(arguments)[:200]}")
    if event == "open" and isinstance(arguments[1], str) and not set("wax+").isdisjoint(arguments[1]):
        _watching.append(f"open {arguments[:2]}")


def _by_import() -> bool:
    """Whether a module is imported, which readers do at their first use, or annotations of our own are looked at."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib") or name.endswith(LIBRARY):
            return True
        frame = frame.f_back
    return False


def attempt(form: Format, path: Path) -> str:
    """'read', or the refusal's kind; AssertionError if it is neither, or too dear: in memory while that is traced."""
    global _watched
    size, begun = path.stat().st_size, time.process_time()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    _watching.clear()
    _watched = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form.read(path)
        said = "read"
    except form.errors as error:
        said = "refused"
        assert len(str(error)) < 5000, f"a message of {len(str(error))} letters"
    finally:
        _watched = False
        peak = tracemalloc.get_traced_memory()[1] - before
    seconds = time.process_time() - begun  # of this process alone: others use the machine too
    assert not _watching, _watching
    assert seconds <= SECONDS, f"{seconds:.1f} s"
    assert peak <= PER_BYTE * size + MEMORY, f"{peak >> 20} MiB for {size} bytes"
    return said


def fuzz(name: str, count: int, minutes: float, seed: int, folder: Path) -> Counter[str]:
    """Damages and reads a format until the count or the time is reached; a file that fails is kept and named."""
    form, chance, counts = FORMATS[name], random.Random(f"{name} {seed}"), Counter()
    valid = folder / f"valid_{name}"
    valid.mkdir(parents=True, exist_ok=True)
    form.make(valid / form.name)
    form.read(valid / form.name)
    content, path, end = (valid / form.name).read_bytes(), folder / form.name, time.monotonic() + 60 * minutes
    archived = zipfile.is_zipfile(valid / form.name)
    for k in range(count):
        if time.monotonic() > end:
            break
        if k % ROUND == 0:  # seldom: each start keeps a kilobyte
            (tracemalloc.stop if k // ROUND % ROUNDS else tracemalloc.start)()
        path.write_bytes((changed_inside if archived and chance.random() < 0.5 else changed)(content, chance))
        try:
            counts[attempt(form, path)] += 1
        except BaseException as error:
            raise AssertionError(f"{name}, number {k} of seed {seed}: {path}: {error!r}") from error
    tracemalloc.stop()
    return counts


sys.addaudithook(_hook)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--format", choices=["all", *FORMATS], required=True)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name in FORMATS if asked.format == "all" else [asked.format]:
        folder = Path(tempfile.mkdtemp(prefix="fuzz_", dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
        print(name, dict(fuzz(name, asked.count, asked.minutes, asked.seed, folder)), flush=True)


if __name__ == "__main__":
    main()
