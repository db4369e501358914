"""Weights of other programs: the state dict that is meant is taken, from files and folders, and nothing is executed."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
import safetensors_files
import torch_files
from golden_checks import ddpm_files

from diffusion_distill.weights import WeightsError, state_dict

ARRAYS = {"conv.weight": np.arange(6, dtype="f4").reshape(2, 3), "conv.bias": np.arange(2, dtype="f2")}


class Marked:
    """Tensors whose values say where they stood, made for a pickle."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, value: float, prefix: str = "") -> dict[str, Any]:
        made = {}
        for name, array in ARRAYS.items():
            storage = torch_files.Storage(np.full(array.size, value, array.dtype), str(self.count))
            strides = tuple(step // array.itemsize for step in array.strides)
            made[prefix + name] = torch_files.Tensor(storage, 0, array.shape, strides)
            self.count += 1
        return OrderedDict(made)


made = Marked()
#: content, `entry`, the value of the tensors that are meant, what was taken, the prefix that was removed
MEANT: dict[str, tuple[Any, str | None, float, str | None, str]] = {
    "plain": (made(1), None, 1, None, ""),
    "plain, from a wrapper": (made(1, "module."), None, 1, None, "kept"),
    "list with an average": ([made(1, "module."), {"state": {}}, 3, 40, made(2)], None, 2, "-1", ""),
    "list without one": ([made(1, "module."), {"state": {}}, 3, 40], None, 1, "0", "module."),
    "list, the other": ([made(1, "module."), made(2)], "0", 1, "0", "module."),
    "tuple of one": ((made(1),), None, 1, "-1", ""),
    "dictionary": ({"epoch": 3, "state_dict": made(1, "module.")}, None, 1, "state_dict", "module."),
    "dictionary with an average": ({"model": made(1), "ema": made(2, "module.")}, None, 2, "ema", "module."),
    "dictionary without one": ({"ema": None, "model": made(1), "other": made(2)}, None, 1, "model", ""),
    "dictionary with a rate": ({"ema": 0.999, "model": made(1)}, None, 1, "model", ""),
    "dictionary, the other": ({"model": made(1), "ema": made(2)}, "model", 1, "model", ""),
    "unknown name": ({"generator": made(1), "step": 2}, "generator", 1, "generator", ""),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", MEANT)
def test_which_tensors_are_meant(name: str, tmp_path: Path) -> None:
    content, entry, value, taken, prefix = MEANT[name]
    path = torch_files.write_zip(tmp_path / "a name that says nothing", content)
    tensors, config, facts = state_dict.read(path, entry=entry)
    kept = "module." if prefix == "kept" else ""
    assert [(n, a.shape, a.dtype) for n, a in tensors.items()] == [
        (kept + n, a.shape, a.dtype) for n, a in ARRAYS.items()
    ]
    assert all((array == value).all() for array in tensors.values())
    assert config is None
    assert (facts["entry"], facts["prefix"]) == (taken, "" if kept else prefix)
    json.dumps(facts)


#: content, `entry`, what the refusal says
NOT_MEANT: dict[str, tuple[Any, str | None, str]] = {
    "a number": (3, None, "holds 3, no state dict"),
    "nothing": ({}, None, "it is no state dict, and no entry of a known name"),
    "an empty list": ([], None, "it has no entry '0'"),
    "tensors with something else": ({**made(1), "step": 3}, None, "'step': 3"),
    "no known name": ({"generator": made(1)}, None, "'generator': a state dict of 2 tensors"),
    "an average of another form": (
        {"ema": {"decay": 0.9, "shadow": [1]}, "model": made(1)},
        None,
        "'ema' seems to hold an average .* Name the one",
    ),
    "an entry that is not there": ({"model": made(1)}, "modle", "no entry 'modle'. Did you mean 'model'"),
    "an entry that is none": ({"model": made(1), "step": 3}, "step", "its entry 'step' is 3"),
    "an entry of a list": ([made(1)], "1", "no entry '1'"),
    "a name that cannot be printed": (made(1, "\x1b[2J"), None, r"a tensor is called '\\x1b\[2J"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", NOT_MEANT)
def test_without_a_state_dict_the_error_lists_what_there_is(name: str, tmp_path: Path) -> None:
    content, entry, said = NOT_MEANT[name]
    with pytest.raises(WeightsError, match=said):
        state_dict.read(torch_files.write_legacy(tmp_path / "file", content), entry=entry)


@pytest.mark.fast
def test_first_bytes_tell_the_format(tmp_path: Path) -> None:
    path = safetensors_files.write(tmp_path / "model.ckpt", ARRAYS)
    assert state_dict.read(path).facts["format"] == "safetensors"
    with pytest.raises(WeightsError, match=r"have no entries\. Leave out entry='ema'"):
        state_dict.read(path, entry="ema")
    with pytest.raises(WeightsError, match=r"index\.json is of safetensors"):
        state_dict.read(folder_of(tmp_path / "folder", SHARDED), entry="ema")
    for content, said in ((b"", "empty"), (b"<html>", "an HTML page"), (b"\x80\x04.", "a pickle"), (b"abc", "b'abc'")):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"{said}.* Read are files of PyTorch"):
            state_dict.read(path)
    with pytest.raises(FileNotFoundError):
        state_dict.read(tmp_path / "not there")


# ---------------------------------------------------------------- folders

STEM, CONFIG = state_dict.STEM, {"_class_name": "UNet2DModel", "sample_size": 4}


def folder_of(place: Path, files: dict[str, Any]) -> Path:
    """A folder with these files: JSON, bytes, or arrays as safetensors."""
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("safetensors"):
            safetensors_files.write(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return place


def marked(value: float) -> dict[str, np.ndarray]:
    return {name: np.full_like(array, value) for name, array in ARRAYS.items()}


FIRST, SECOND = ({name: marked(1)[name]} for name in ARRAYS)
MAP = {name: f"part-{k + 1}.safetensors" for k, name in enumerate(ARRAYS)}
PARTS = {"part-1.safetensors": FIRST, "part-2.safetensors": SECOND}
SHARDED = {"config.json": CONFIG, f"{STEM}.safetensors.index.json": {"metadata": {}, "weight_map": MAP}, **PARTS}
WHOLE, HALF = {f"{STEM}.safetensors": marked(1)}, {f"{STEM}.fp16.safetensors": marked(2)}
#: the files of a folder, in all of which the tensors that are meant are 1
FOLDERS: dict[str, dict[str, Any]] = {
    "whole": {"config.json": CONFIG, **WHOLE},
    "whole, and in half precision": {"config.json": CONFIG, **HALF, **WHOLE},
    "half precision": {"config.json": CONFIG, f"{STEM}.fp16.safetensors": marked(1)},
    "sharded": SHARDED,
    "sharded, and in half precision": {**SHARDED, **HALF},
    "a pipeline": {"model_index.json": {"unet": []}, **{f"unet/{name}": content for name, content in SHARDED.items()}},
    "a pipeline of a transformer": {
        "model_index.json": {"transformer": [], "vae": []},
        "transformer/config.json": CONFIG,
        f"transformer/{STEM}.safetensors": marked(1),
        "unet/other": b"",
    },
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    tensors, config, facts = state_dict.read(folder_of(tmp_path, FOLDERS[name]))
    assert list(tensors) == list(ARRAYS)
    assert all((array == 1).all() for array in tensors.values())
    assert config == CONFIG
    assert facts["subfolder"] == ("transformer" if "transformer" in name else "unet" if "pipeline" in name else None)


@pytest.mark.fast
def test_a_folder_with_a_file_of_pytorch(tmp_path: Path) -> None:
    folder_of(tmp_path, {"config.json": CONFIG})
    torch_files.write_zip(tmp_path / f"{STEM}.bin", made(3))
    tensors, config, facts = state_dict.read(tmp_path)
    assert (list(tensors), config, facts["format"]) == (list(ARRAYS), CONFIG, "torch")


def index(weight_map: Any) -> dict[str, Any]:
    return {**SHARDED, f"{STEM}.safetensors.index.json": {"weight_map": weight_map}}


BAD_FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"notes.txt": b""}, "has no config.json, but 'notes.txt'"),
    "no weights": ({"config.json": CONFIG}, "has no weights, but 'config.json'"),
    "a pipeline of something else": ({"model_index.json": {"prior": []}}, "is a pipeline of 'prior'"),
    "a pipeline without its network": ({"model_index.json": {"unet": []}}, "none of the subfolders unet, transformer"),
    "a list for a description": ({"config.json": [1]}, "config.json: the JSON is a list"),
    "a field twice": ({"config.json": b'{"a": 1, "a": 2}'}, "the name 'a' stands twice"),
    "no number": ({"config.json": b'{"a": NaN}'}, "not finite"),
    "a large description": ({"config.json": b" " * 2**21}, "at most 1048576 are read"),
    "no map": (index(None), "has no weight_map"),
    "a map of numbers": (index({"a": 1}), "has no weight_map"),
    "a path upwards": (index({"a": "../part-1.safetensors"}), "without folders in their names"),
    "a path from the root": (index({"a": "/part-1.safetensors"}), "without folders in their names"),
    "a folder": (index({"a": ".."}), "without folders in their names"),
    "another kind of file": (index({"a": "part-1.bin"}), "without folders in their names"),
    "a file that is not there": (index(MAP | {"a": "part-3.safetensors"}), "lacks 'part-3.safetensors'"),
    "a tensor that is not there": (index(MAP | {"a": "part-1.safetensors"}), "'a' is in one of them only"),
    "a tensor elsewhere": (index(dict.fromkeys(ARRAYS, "part-1.safetensors")), "'conv.bias' is in one of them only"),
    "two indices": (
        {"config.json": CONFIG, "a.safetensors.index.json": {}, "b.safetensors.index.json": {}},
        "several indices",
    ),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_folders_that_are_refused(name: str, tmp_path: Path) -> None:
    files, said = BAD_FOLDERS[name]
    with pytest.raises(WeightsError, match=said):
        state_dict.read(folder_of(tmp_path, files))


# ---------------------------------------------------------------- damaged and hostile files


@pytest.mark.fast
@pytest.mark.parametrize("how", ["write_zip", "write_legacy", "safetensors"])
def test_cut_or_changed_anywhere_a_file_is_read_or_refused(how: str, tmp_path: Path) -> None:
    path, rng = tmp_path / "file", np.random.default_rng(0)
    if how == "safetensors":
        safetensors_files.write(path, ARRAYS)
    else:
        getattr(torch_files, how)(path, [made(1, "module."), {"state": {0: {"step": 3}}}, 17, made(2)])
    good = path.read_bytes()
    for trial in range(300):
        bad = bytearray(good)
        at = int(rng.integers(len(good)))
        bad[at : at + 1] = b"" if trial % 3 == 0 else rng.bytes(1)
        path.write_bytes(bad[:at] if trial % 5 == 0 else bad)
        try:
            state_dict.read(path)
        except WeightsError:
            continue


HOSTILE = places.GOLDEN / "ddpm" / "files.tar.xz"
EXPECTED = json.loads(HOSTILE.with_name("files_expected.json").read_text())["bad"] if HOSTILE.is_file() else {}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ddpm_files.unpacked(HOSTILE, tmp_path_factory.mktemp("files")) / "bad"


@pytest.mark.skipif(not EXPECTED, reason="needs the optional sibling folder ../shared/golden")
@pytest.mark.parametrize("name", [name for name, facts in EXPECTED.items() if facts["kind"] != "content"])
def test_hostile_files(name: str, unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_MARKER", str(tmp_path / "marker"))
    with ddpm_files.watched() as events:
        _, said = ddpm_files.outcome(unpacked / name)
    assert EXPECTED[name]["expect"] in ("either", "error" if said else "ok")
    assert not events
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_what_a_payload_does_would_be_seen(tmp_path: Path) -> None:
    with ddpm_files.watched() as events:
        (tmp_path / "read").write_bytes(b"")
        (tmp_path / "read").read_bytes()
        os.system("true")
    assert [event.split()[0] for event in events] == ["open", "os.system"]
