"""Fixtures of EDM's published weights (folder edm): snapshot files, and hostile ones.

Files in `pickles/` have the structure of the released ones. Beside them lie `expected.json`, what each holds, and
`expected.npz`, what its wrapper returns. A zip of hostile files has its own expectations.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

from diffusion_distill.formats import torch_pickle
from diffusion_distill.process.levels import Level
from diffusion_distill.weights import WeightsError, edm
from golden_checks.btd_weights import report
from golden_checks.common import FLOAT32, FLOAT64, Fixture, Kind, Mode, Rule, exact

NEEDED = "needs the file itself, which is not in this folder"

# ------------------------------------------------------------------------------------------------ snapshots


def check_snapshot(fixture: Fixture, mode: Mode) -> None:
    for expected in beside(fixture):
        if expected.path.suffix == ".npz":
            compare_outputs(expected, fixture.path, mode)
        else:
            compare_content(expected, fixture.path)


def check_outputs(fixture: Fixture, mode: Mode) -> None:
    for match in fixture.matches(r"(.*)\.D"):
        path = fixture.path.with_name(f"{match[1]}.pkl")
        if path.exists():
            compare_outputs(fixture, path, mode)
        else:
            fixture.skip([key for key in fixture.arrays if key.startswith(f"{match[1]}.")], NEEDED)


def check_content(fixture: Fixture, mode: Mode) -> None:
    for name in fixture.meta["files"]:
        path = fixture.path.with_name(name)
        if path.exists():
            compare_content(fixture, path)
        else:
            fixture.skip([key for key in fixture.arrays if key.startswith(f"files/{name}/")], NEEDED)


def compare_outputs(expected: Fixture, path: Path, mode: Mode) -> None:
    """The denoiser of a file against the recorded output of its wrapper."""
    stem = path.stem
    checkpoint = edm.read(path)
    x, sigma = (jnp.asarray(expected.input(f"{stem}.{name}")) for name in ("x", "sigma"))
    labels = jnp.asarray(expected.input(f"{stem}.class_labels")) if f"{stem}.class_labels" in expected else None
    denoise = checkpoint.model.denoiser(checkpoint.params)
    out = denoise(jnp.moveaxis(x, 1, -1), Level(jnp.ones_like(sigma), sigma), labels)
    # The README's tolerances; c_out is sigma but for EDM's own wrapper, where it is below 1.
    prediction = checkpoint.model.prediction
    largest = np.ones(len(x)) if prediction == "edm" else np.maximum(1, np.asarray(sigma))
    bound = 2e-4 if prediction in ("eps", "eps_var") else 5e-5
    scale = largest[:, None, None, None]
    expected.compare(
        f"{stem}.D", jnp.moveaxis(out, -1, 1), mode, Rule(bound, "·max(1, |c_out|)", lambda reference: scale)
    )


def compare_content(expected: Fixture, path: Path) -> None:
    """Names, arrays and arguments in a file."""
    where, facts = f"files/{path.name}", expected.meta["files"][path.name]
    content, wrapper = path.read_bytes(), torch_pickle.read(path)
    inner, tensors = wrapper.modules["model"], wrapper.tensors()
    expected.equal(f"{where}/bytes", len(content))
    expected.equal(f"{where}/sha256", hashlib.sha256(content).hexdigest())
    expected.equal(f"{where}/precond_class", wrapper.class_name)
    expected.equal(f"{where}/model_class", inner.class_name)
    for name in ("sigma_min", "sigma_max"):
        expected.equal(f"{where}/{name}", type(facts[name])(wrapper.attributes[name]))
    parameters = [array for _, module in wrapper.walk() for array in module.parameters.values()]
    expected.equal(f"{where}/num_params", sum(array.size for array in parameters))
    all_of(expected, f"{where}/init_kwargs/", wrapper.init_kwargs == facts["init_kwargs"])
    same = list(tensors) == list(facts["tensors"])
    all_of(expected, f"{where}/tensors/", same and all(map(is_tensor, tensors.values(), facts["tensors"].values())))
    unread = ("top_level_keys", "written_with", "special", "loss_fn", "augment_pipe", "dataset_kwargs")
    keys = [key for key in expected.arrays if key.startswith(tuple(f"{where}/{name}" for name in unread))]
    expected.skip(keys, "what is not read: words, and entries beside the network")


def is_tensor(array: np.ndarray, facts: dict[str, Any]) -> bool:
    content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
    described = list(array.shape) == facts["shape"] and str(array.dtype) == facts["dtype"]
    first = array.reshape(-1)[: len(facts["first4"])].astype(np.float64).tolist() == facts["first4"]
    return described and first and hashlib.sha256(content).hexdigest() == facts["sha256"]


def all_of(fixture: Fixture, prefix: str, same: bool) -> None:
    """One line for all values below a prefix."""
    keys = [key for key in fixture.arrays if key.startswith(prefix)]
    fixture.accounted |= dict.fromkeys(keys, "compared")
    fixture.report(f"{prefix}* ({len(keys)} values)", 0.0 if same else np.inf, FLOAT64, exact())


def beside(fixture: Fixture) -> list[Fixture]:
    """The expectations in a snapshot's folder that know it, whose results are reported as the snapshot's."""
    paths = [path for path in sorted(fixture.path.parent.iterdir()) if path.suffix in (".json", ".npz")]
    expected = [Fixture(path, fixture.name, fixture.data, fixture.emit) for path in paths]
    known = [f"{fixture.path.stem}.D" in e or fixture.path.name in e.meta.get("files", {}) for e in expected]
    return [e for e, knows in zip(expected, known, strict=True) if knows]


# -------------------------------------------------------------------------------------------- hostile files

MEMORY = 2**26  # bytes that reading one file may take at most; a file's claims go up to 2**60


def check_hostile(fixture: Fixture, mode: Mode) -> None:
    with zipfile.ZipFile(fixture.path) as archive, tempfile.TemporaryDirectory() as folder:
        expect = json.loads(archive.read("expect.json"))
        for name, facts in expect["files"].items():
            path, marker = Path(folder) / name, Path(folder) / "marker"
            path.write_bytes(archive.read(name))
            tracemalloc.start()
            with mock.patch.dict(os.environ, {expect["marker_env"]: str(marker)}):
                said = outcome(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            verdict = facts["expect"] == ("must_raise" if said else "must_load")
            passed = verdict and not marker.exists() and peak < MEMORY
            report(fixture, name, passed, f"{said or 'loaded'}, {peak} bytes at most")


def outcome(path: Path) -> str:
    """What the refusal of a file says; "" if it is read. Any other exception is the check's to report."""
    try:
        edm.read(path)
    except WeightsError as error:
        return " ".join(str(error).replace(str(path), "").split())[:120]
    return ""


def _is_snapshot(fixture: Fixture) -> bool:
    return fixture.path.suffix == ".pkl" and bool(beside(fixture))


def _is_content(fixture: Fixture) -> bool:
    files = fixture.meta.get("files")
    return isinstance(files, dict) and all("precond_class" in facts for facts in files.values())


def _is_hostile(fixture: Fixture) -> bool:
    if fixture.path.suffix != ".zip":
        return False
    with zipfile.ZipFile(fixture.path) as archive:
        return "expect.json" in archive.namelist()


KINDS = [
    Kind("edm snapshot", _is_snapshot, check_snapshot, modes=(FLOAT32,)),
    Kind(
        "edm outputs of snapshots",
        lambda fixture: fixture.meta.get("fixture") == "pickle outputs",
        check_outputs,
        modes=(FLOAT32,),
    ),
    Kind(
        "edm content of snapshots",
        _is_content,
        check_content,
        lambda fixture: [([key for key in fixture.arrays if not key.startswith("files/")], "words")],
        modes=(FLOAT64,),
    ),
    Kind("edm hostile files", _is_hostile, check_hostile, modes=(FLOAT32,)),
]
