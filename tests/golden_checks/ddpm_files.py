"""Fixtures of weight files of other programs (folder ddpm): good ones, and bad ones, of which many are hostile.

They lie in an archive, `*.tar.xz`, with `expected.json`, which says what each holds or whether it must be refused, and
`expected_outputs.npz`, what the networks return; copies of these two lie beside the archive. A bad file is refused by
the reader, or, if its kind is `content`, by the importer of the network it is named for. Nothing in it may run:
payloads would create the file that an environment variable names, and an audit hook watches the reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

from diffusion_distill.weights import WeightsError, state_dict
from diffusion_distill.weights.families import FAMILIES
from golden_checks.btd_weights import report
from golden_checks.common import FLOAT32, Fixture, Kind, Mode, exact, measure
from golden_checks.ddpm_networks import OUT, channels_first, with_size
from golden_checks.edm_weights import all_of

EXPECTED, OUTPUTS = "expected.json", "expected_outputs.npz"
NOT_WEIGHTS = (EXPECTED, OUTPUTS, state_dict.CONFIG, "marker")
MAX_UNPACKED = 2**28  # bytes
SECONDS = 10
WORDS = ("content", "why", "family", "reference_reader", "pickle_globals", "would_create_marker", "kind", "expect")
NEEDED = "needs the files themselves, whose archive is not in this folder"

# ------------------------------------------------------------------------------------------------ the archive


def check_archive(fixture: Fixture, mode: Mode) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = unpacked(fixture.path, Path(folder))
        expected, outputs = (Fixture(root / n, fixture.name, fixture.data, fixture.emit) for n in (EXPECTED, OUTPUTS))
        for name in expected.meta["good"]:
            with fixture.attempt(f"good/{name}", mode):
                check_good(expected, outputs, root, name, mode)
        controls: list[dict[str, Any]] = []
        for name in expected.meta["bad"]:
            with fixture.attempt(f"bad/{name}", mode):
                check_bad(expected, root, name, controls)
        listed = {f"{kind}/{name}" for kind in ("good", "bad") for name in expected.meta[kind]}
        files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        unlisted = [name for name in files if name not in listed and Path(name).name not in NOT_WEIGHTS]
        report(expected, "all files are listed", not unlisted, f"{unlisted or ''}")
        read = [key for key in expected.arrays if key.startswith("nets/") or key.split("/")[-1] in ("kind", "expect")]
        expected.accounted |= dict.fromkeys([*read, "marker_variable"], "input")
        patterns = rf"digest|(good|bad)/.*/({'|'.join(WORDS)})(/\d+)?"
        expected.skip([match[0] for match in expected.matches(patterns)], "words")
        for part in (expected, outputs):
            part.finish()
            fixture.accounted |= part.accounted


def unpacked(path: Path, folder: Path) -> Path:
    """Unpacks an archive into a new folder; returns the folder of its expectations."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        if sum(member.size for member in members) > MAX_UNPACKED or not all(m.isfile() or m.isdir() for m in members):
            raise ValueError("the archive is larger than expected, or holds something else than files and folders")
        archive.extractall(folder, members, filter="data")
    [expected] = folder.rglob(EXPECTED)
    return expected.parent


# ------------------------------------------------------------------------------------------------ good files


def check_good(expected: Fixture, outputs: Fixture, root: Path, name: str, mode: Mode) -> None:
    """A file, and the folder of diffusers it lies in, hold these tensors, and the network returns these numbers."""
    path, facts = root / "good" / name, expected.meta["good"][name]
    expected.equal(f"good/{name}/bytes", path.stat().st_size)
    in_folder = [path.parent] if (path.parent / state_dict.CONFIG).is_file() else []
    for place in (path, *in_folder):
        found = state_dict.read(place)
        described = {
            name: [list(array.shape), str(array.dtype), digest(array)] for name, array in found.tensors.items()
        }
        all_of(expected, f"good/{name}/tensors/", described == facts["tensors"])
        if facts["family"] is not None:
            net = expected.meta["nets"][facts["family"]]
            out = output(outputs, facts["family"], net["family"], found.config or net["config"], found.tensors)
            recorded = outputs.arrays[f"{facts['family']}/out"]
            if weights_in(facts) == weights_of(expected.meta["good"], facts["family"]):
                error = measure(out.astype(np.float64), recorded.astype(np.float64), OUT)
                expected.report(f"good/{name}: {facts['family']}/out", error, mode, OUT)
            else:  # its output was not recorded
                report(expected, f"good/{name}: is imported", bool(np.isfinite(out).all()))


def digest(array: np.ndarray) -> str:
    kind = "<i8" if array.dtype.kind in "iub" else "<f8"
    return hashlib.sha256(np.ascontiguousarray(array).astype(kind).tobytes()).hexdigest()[:16]


def output(
    outputs: Fixture, net: str, family: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The output of a file's network, in PyTorch's layout."""
    outputs.accounted[f"{net}/out"] = "compared"
    x, t = jnp.asarray(outputs.input(f"{net}/x").transpose(0, 2, 3, 1)), jnp.asarray(outputs.input(f"{net}/t"))
    labels = jnp.asarray(outputs.input(f"{net}/y"), jnp.int32) if f"{net}/y" in outputs else None
    given = () if labels is None or family == "guided_diffusion_classifier" else (labels,)
    config = with_size(FAMILIES[family], config, x.shape[1])
    network, _ = FAMILIES[family].network(config)
    params = FAMILIES[family].to_params(config, tensors)
    return channels_first(network.apply({"params": params}, x, t, *given))


def weights_in(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The values of a file's tensors, whatever they are called and stored as."""
    return tuple(sorted(described[2] for described in facts["tensors"].values()))


def weights_of(good: Mapping[str, Any], net: str) -> tuple[str, ...]:
    """The weights that a network's recorded output was made with: those that most of its files hold."""
    return Counter(weights_in(facts) for facts in good.values() if facts["family"] == net).most_common(1)[0][0]


# ------------------------------------------------------------------------------------------------- bad files


def check_bad(expected: Fixture, root: Path, name: str, controls: list[dict[str, Any]]) -> None:
    """A bad file is refused, a control is read; nothing is executed, and work and memory are bounded."""
    path, facts = root / "bad" / name, expected.meta["bad"][name]
    expected.equal(f"bad/{name}/bytes", path.stat().st_size)
    marker, begin = root / "marker", time.perf_counter()
    tracemalloc.start()
    with mock.patch.dict(os.environ, {expected.meta["marker_variable"]: str(marker)}), watched() as events:
        tensors, said = outcome(path)
    took, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if facts["kind"] == "content" and tensors is not None:
        said = refusal(expected.meta["nets"], name, tensors)
    bounded = took < SECONDS and peak < 2.5 * path.stat().st_size + 1e8
    wanted = facts["expect"] == "either" or (facts["expect"] == "error") == bool(said)
    if facts["kind"] == "control" and tensors is not None:  # all controls hold the same
        controls.append({name: array.tolist() for name, array in tensors.items()})
        wanted = wanted and controls[-1] == controls[0]
    passed = wanted and bounded and not events and not marker.exists()
    report(
        expected,
        f"bad/{name}",
        passed,
        f"{said or 'read'}, {peak} bytes at most{'; did: ' * bool(events)}{events or ''}",
    )


def outcome(path: Path) -> tuple[Mapping[str, np.ndarray] | None, str]:
    """The tensors of a file, or what its refusal says. Any other exception is the check's to report."""
    try:
        return state_dict.read(path).tensors, ""
    except WeightsError as error:
        return None, " ".join(str(error).replace(str(path), "").split())[:120]


def refusal(nets: Mapping[str, Any], name: str, tensors: Mapping[str, np.ndarray]) -> str:
    """What the importers say to a file: those of diffusers to safetensors, DDPM's to the others."""
    diffusers = name.endswith(".safetensors")
    meant = [net for net in nets.values() if net["family"] == ("diffusers_unet2d" if diffusers else "ddpm")]
    assert meant
    try:
        for net in meant:
            FAMILIES[net["family"]].to_params(net["config"], tensors)
    except WeightsError as error:
        return " ".join(str(error).split())[:120]
    return ""


#: What a reader of weights has no reason to do.
FORBIDDEN = re.compile(r"os\.(system|exec|fork|posix_spawn|spawn|mkdir|remove|rename|link|symlink)|subprocess\..*|"
                       r"pickle\.find_class|socket\..*|ctypes\..*")  # fmt: skip
_watching: list[list[str]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the forbidden events of what happens inside."""
    _add_hook()
    _watching.append(events := [])
    try:
        yield events
    finally:
        _watching.pop()


@cache
def _add_hook() -> None:
    sys.addaudithook(_hook)  # for good: hooks cannot be removed


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if FORBIDDEN.fullmatch(event) or (event == "open" and isinstance(arguments[2], int) and arguments[2] & writes):
        _watching[-1].append(f"{event} {arguments[0]!s:.40}" if arguments else event)


# --------------------------------------------------------------------------------- the copies beside the archive


def check_copy(fixture: Fixture, mode: Mode) -> None:
    """A copy of the expectations is the one in the archive."""
    archive = next((path for path in sorted(fixture.path.parent.glob("*.tar.xz")) if is_archive(path)), None)
    if archive is None:
        fixture.skip(list(fixture.arrays), NEEDED)
        return
    with tempfile.TemporaryDirectory() as folder:
        inside = unpacked(archive, Path(folder)) / (EXPECTED if fixture.path.suffix == ".json" else OUTPUTS)
        original = Fixture(inside, fixture.name, fixture.data, fixture.emit)
    if fixture.path.suffix == ".json":
        all_of(fixture, "", fixture.meta == original.meta)
    for key in [key for key in fixture.arrays if key not in fixture.accounted]:
        fixture.compare(key, original.arrays[key], mode, exact())


def is_archive(path: Path) -> bool:
    if not path.name.endswith(".tar.xz"):
        return False
    with tarfile.open(path) as archive:
        parts = {part for name in archive.getnames() for part in Path(name).parts}
    return {EXPECTED, OUTPUTS, "good", "bad"} <= parts


def is_outputs(fixture: Fixture) -> bool:
    nets = {key.rpartition("/")[0] for key in fixture.arrays}
    known = all(re.fullmatch(r"\w+/[xty]|\w+/out", key) for key in fixture.arrays)
    return fixture.path.suffix == ".npz" and bool(nets) and known and all(f"{net}/out" in fixture for net in nets)


KINDS = [
    Kind("ddpm files", lambda fixture: is_archive(fixture.path), check_archive, modes=(FLOAT32,)),
    Kind(
        "ddpm expectations of files",
        lambda fixture: {"marker_variable", "nets", "good", "bad"} <= set(fixture.meta),
        check_copy,
        modes=(FLOAT32,),
    ),
    Kind("ddpm outputs of files", is_outputs, check_copy, modes=(FLOAT32,)),
]
