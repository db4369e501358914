"""Artefacts: on disk and back, killed at any moment, read while written, damaged."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import pytest
import toys
from toys import equal

from diffusion_distill.denoisers.model import Model
from diffusion_distill.process.processes import Cosine
from diffusion_distill.training import params_folder
from diffusion_distill.training.artefact import Artefact

# --- artefacts


@pytest.mark.fast
def test_an_artefact_survives_the_disk(tmp_path: Path, toy_networks: None) -> None:
    model = Model(toys.Perceptron(2, width=8), (3, 2, 1), Cosine(-9, 8), prediction="both")
    artefact = Artefact(model, toys.parameters(model), steps=4, provenance={"method": "by hand"})
    found = Artefact.load(artefact.save(tmp_path / "a" / "b"))
    assert (found.model, found.steps, found.provenance["method"]) == (model, 4, "by hand")
    assert equal(found.params, artefact.params)
    z, level = jnp.ones((1, 3, 2, 1)), model.process.level(jnp.full(1, 0.3))
    chex.assert_trees_all_equal(found.denoiser()(z, level), artefact.denoiser()(z, level))
    other = dataclasses.replace(artefact, params=toys.parameters(model, 5))
    assert equal(Artefact.load(other.save(tmp_path / "a" / "b")).params, other.params), "it can be replaced"


@pytest.mark.fast
@pytest.mark.parametrize("after", range(5))
def test_killed_at_any_moment_an_artefact_is_the_old_or_the_new_one(
    after: int, teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that ends after so many changes of names; the next one succeeds and leaves nothing behind."""
    folder, done = teacher.save(tmp_path / "artefact"), []
    new = dataclasses.replace(teacher, params=toys.parameters(teacher.model, 5), steps=8)

    def killed(change: Callable) -> Callable:
        def changed(*arguments: Any) -> Any:
            if Path(arguments[0]).parent == folder:  # else it is Orbax's
                if len(done) == after:
                    raise KeyboardInterrupt
                done.append(arguments[0])
            return change(*arguments)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed(Path.rename))
        patch.setattr("os.replace", killed(os.replace))
        if after < 4:
            with pytest.raises(KeyboardInterrupt):
                new.save(folder)
        else:
            new.save(folder)
    found = Artefact.load(folder)
    assert found.steps == (8 if after == 4 else 0)
    chex.assert_trees_all_equal(found.params, (new if after == 4 else teacher).params)
    chex.assert_trees_all_equal(Artefact.load(new.save(folder)).params, new.params)
    assert {path.name for path in folder.iterdir()} == {"params", "provenance.json", "model.json"}


@pytest.mark.fast
def test_killed_twice_before_the_description_an_artefact_is_the_old_one(
    teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = teacher.save(tmp_path / "artefact")

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(params_folder, "write_json", killed)
        for seed in (5, 6):
            with pytest.raises(KeyboardInterrupt):
                dataclasses.replace(teacher, params=toys.parameters(teacher.model, seed)).save(folder)
            chex.assert_trees_all_equal(Artefact.load(folder).params, teacher.params)


@pytest.mark.fast
def test_a_users_file_in_the_place_of_parameters_is_not_replaced(teacher: Artefact, tmp_path: Path) -> None:
    (tmp_path / "params").write_text("notes")
    with pytest.raises(ValueError, match=r"Cannot write the folder .*params: there is a file of that name.*Move it"):
        teacher.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["params"] and (tmp_path / "params").read_text() == "notes"


@pytest.mark.fast
def test_what_another_program_still_reads_on_a_network_disk_may_stay(
    teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that is open as .nfs..., and the folder around it cannot be deleted until it is closed."""
    folder, delete = teacher.save(tmp_path / "artefact"), shutil.rmtree

    def rmtree(path: Any, *arguments: Any, **others: Any) -> None:
        if Path(path).name.endswith(".replaced"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        delete(path, *arguments, **others)

    new = dataclasses.replace(teacher, params=toys.parameters(teacher.model, 5), steps=8)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        new.save(folder)
    assert Artefact.load(folder).steps == 8 and (folder / "params.replaced").is_dir()
    teacher.save(folder)
    assert Artefact.load(folder).steps == 0 and not (folder / "params.replaced").exists(), "gone with the next one"


def test_an_artefact_can_be_read_while_another_takes_its_place(teacher: Artefact, tmp_path: Path) -> None:
    both = [dataclasses.replace(teacher, params=toys.parameters(teacher.model, k), steps=k) for k in (1, 2)]
    folder, stop = both[0].save(tmp_path / "artefact"), threading.Event()

    def write() -> None:
        for k in itertools.count():
            if stop.is_set():
                return
            both[k % 2].save(folder)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(8):
            found = Artefact.load(folder)
            chex.assert_trees_all_equal(found.params, both[found.steps - 1].params)
    finally:
        stop.set()
        writer.join()


SPOIL: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, r"not an artefact.*no model\.json.*student_1"),
    "no model": (lambda f: (f / "model.json").unlink(), FileNotFoundError, r"not an artefact.*no model\.json"),
    "no parameters": (lambda f: shutil.rmtree(f / "params"), FileNotFoundError, r"params"),
    "another width": (lambda f: edit(f, "network", width=9), ValueError, r"16|9|shape"),
    "a width of nothing": (lambda f: edit(f, "network", width=-1), ValueError, r"model\.json: .*cannot be built"),
    "an unknown network": (lambda f: edit(f, "network", name="perceptrn"), ValueError, r"'perceptrn'.*'perceptron'"),
    "a part without a name": (lambda f: forget_name(f, "process"), ValueError, r"process lacks its name.*cosine"),
    "an unknown field": (lambda f: edit(f, "network", widht=8), ValueError, r"'widht'.*'width'"),
    "an unknown process": (lambda f: edit(f, "process", name="cosin"), ValueError, r"'cosin'.*'cosine'"),
    "a mistyped field": (lambda f: edit(f, "process", logsnr_min="low"), TypeError, r"logsnr_min.*float.*'low'"),
}


def edit(folder: Path, part: str, **changes: Any) -> None:
    """Changes fields of an artefact's description."""
    content = json.loads((folder / "model.json").read_text())
    content["model"][part].update(changes)
    (folder / "model.json").write_text(json.dumps(content))


def forget_name(folder: Path, part: str) -> None:
    """Takes the name out of a part of an artefact's description."""
    content = json.loads((folder / "model.json").read_text())
    del content["model"][part]["name"]
    (folder / "model.json").write_text(json.dumps(content))


@pytest.mark.fast
@pytest.mark.parametrize(("spoil", "error", "said"), SPOIL.values(), ids=SPOIL)
def test_a_damaged_artefact_says_what_is_wrong(
    spoil: Callable[[Path], Any], error: type[Exception], said: str, teacher: Artefact, tmp_path: Path
) -> None:
    folder = teacher.save(tmp_path / "artefact")
    spoil(folder)
    with pytest.raises(error, match=said):
        Artefact.load(folder)
