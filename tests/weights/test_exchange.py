"""Exported models are read as written; whatever else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from weight_files import DENSE, MODEL, Bomb, Flat, assert_same, files_in, random_arrays, write

from diffusion_distill.api import export_weights, import_weights
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import edm_grids, grids
from diffusion_distill.process.ve import VE
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import (
    WeightsError,
    exchange,
    matching,
)


@pytest.mark.fast
def test_export_and_back(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    params = random_arrays(0)
    params |= {
        "half.precision/kernel": params[DENSE].astype(jnp.bfloat16),
        "transposed": params[DENSE].T,
        "zero-d": jnp.ones(()),
    }
    description = {"model": MODEL.to_dict(), "steps": 8, "provenance": {"text": "ünï"}}
    path = exchange.save(tmp_path / "new" / "model.safetensors", matching.unflatten(params), description)
    assert files_in(path.parent) == ["model.safetensors"]
    found, described = exchange.load(path)
    assert described == json.loads(json.dumps(description))
    assert Model.from_dict(described["model"]) == MODEL
    for arrays in (matching.flatten(found), load_file(path)):  # also in plain Python
        assert arrays.keys() == params.keys()
        for name, value in params.items():
            assert arrays[name].dtype == value.dtype
            np.testing.assert_array_equal(arrays[name], value)


@pytest.mark.fast
def test_exports_in_older_words_are_read(tmp_path: Path) -> None:
    """The noise process was the schedule, shape the image shape, and EDM's grid a schedule of its own."""
    params, today = random_arrays(0), MODEL.to_dict()
    old = {name: today[name] for name in ("network", "prediction", "time_input")}
    old |= {"schedule": today["process"], "image_shape": today["shape"]}
    edm = {"name": "edm", "steps": 8, "sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0}

    def read(steps: int, **changes: Any) -> Any:
        description = {"model": {**old, **changes}, "steps": steps, "provenance": {}}
        return exchange.read(exchange.save(tmp_path / "old.safetensors", matching.unflatten(params), description))

    assert (read(4).model, read(4).grid) == (MODEL, None)
    assert read(0, prediction="score").model.prediction == "scaled_score"
    teacher, student = (read(steps, schedule=edm) for steps in (0, 4))
    assert teacher.model.process == student.model.process == VE(50.0, 0.01)
    assert teacher.grid is None
    np.testing.assert_allclose(student.grid.sigma, edm_grids.edm(8, 0.01, 50.0, 5.0).sigma[::2], rtol=1e-15)


@pytest.mark.fast
def test_a_students_levels_are_exported(tmp_path: Path) -> None:
    grid = grids.make_grid(MODEL.process, 8).at(slice(None, None, 2))
    student = Artefact(MODEL, matching.unflatten(random_arrays(0)), 4, {}, grid)
    found = import_weights(export_weights(student, tmp_path / "student.safetensors"), tmp_path / "student")
    again = Artefact.load(tmp_path / "student")
    for artefact in (found, again):
        assert artefact.grid is not None
        np.testing.assert_array_equal(np.stack(artefact.grid), np.stack(grid))
    with pytest.raises(ValueError, match=r"student of 4 steps has 5 levels, got 9"):
        Artefact(MODEL, {}, 4, {}, grids.make_grid(MODEL.process, 8))


@pytest.mark.fast
def test_an_export_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exchange.save(tmp_path / "model.safetensors", {"a": np.zeros(2)}, {})
    for params, description in (
        ({"a/b": np.zeros(2)}, {}),
        ({"a": np.zeros(2)}, {"x": float("nan")}),
        ({"a": np.array("x")}, {}),
    ):
        with pytest.raises(ValueError):
            exchange.save(path, params, description)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        exchange.save(path, {"a": np.ones(2)}, {})
    assert files_in(tmp_path) == ["model.safetensors"]
    np.testing.assert_array_equal(exchange.load(path)[0]["a"], np.zeros(2))


@pytest.mark.fast
def test_files_that_were_not_exported_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save

    path = tmp_path / "file"
    arrays = {"a": np.zeros(2, np.float32)}
    good = exchange.save(path, arrays, {"x": 1}).read_bytes()
    foreign = [save(arrays), save(arrays, {"format": "pt"}), save(arrays, {exchange.KEY: "{"})]
    foreign += [save(arrays, {exchange.KEY: text}) for text in ("[1]", "[" * 100_000)]
    clash = save({"a": arrays["a"], "a/b": arrays["a"]}, {exchange.KEY: "{}"})
    garbage = [b"", b"12345678", np.random.default_rng(0).bytes(500), b"\xff" * 8 + b"{}", pickle.dumps(Bomb())]
    for content in (*foreign, clash, *garbage, *(good[:length] for length in range(len(good))), good + b"x"):
        with pytest.raises(WeightsError):
            exchange.load(write(path, content))


@pytest.mark.fast
def test_changed_anywhere_an_export_is_read_or_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "file", np.random.default_rng(0)
    good = exchange.save(path, {"a": np.zeros(2, np.float32)}, {"x": 1}).read_bytes()
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            exchange.load(write(path, bytes(bad)))
        except WeightsError:
            continue


ABOUT = {"model": MODEL.to_dict(), "steps": 8, "provenance": {"text": "x"}}


def test_an_exported_model_is_read_as_written(tmp_path: Path) -> None:
    params = random_arrays(0)
    path = exchange.save(tmp_path / "model.safetensors", matching.unflatten(params), ABOUT)
    found = exchange.read(path, MODEL)
    assert_same(found.params, params)
    assert (found.model, found.steps, found.facts) == (MODEL, 8, {"text": "x"})
    with pytest.raises(WeightsError, match="another model"):
        exchange.read(path, dataclasses.replace(MODEL, prediction="eps"))


NETWORK = ABOUT["model"]["network"]
DEEP = {"name": "dit", "width": 4, "depth": 60_000, "num_heads": 1, "out_ch": 1}
WRONG_DESCRIPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({name: None}, f"has {name} None") for name in ABOUT),
    *(({"steps": steps}, "steps") for steps in (-1, 2**40, True, 1.5, "8")),
    ({"model": {}}, "no model"),
    ({"model": ABOUT["model"] | {"shape": 4}}, "no model"),
    ({"model": ABOUT["model"] | {"prediction": ["x"]}}, "no model"),
    ({"model": ABOUT["model"] | {"network": NETWORK | {"num_res_blocks": 60_000}}}, "60001 blocks"),
    ({"model": ABOUT["model"] | {"network": DEEP}}, "60000 blocks"),
    ({"model": ABOUT["model"] | {"network": NETWORK | {"ch": 2**40}}}, "plausible"),
    ({"model": ABOUT["model"] | {"network": DEEP | {"depth": 1}, "shape": [2**15, 2**15, 1]}}, "sinusoids"),
    ({"model": ABOUT["model"] | {"network": NETWORK | {"ch_mult": [1, 1]}, "shape": [3, 3, 1]}}, "cannot be built for"),
    ({"model": ABOUT["model"] | {"network": {"name": "perceptron", "out_ch": 1, "width": -1}}}, "cannot be built for"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_DESCRIPTIONS)
def test_descriptions_of_no_plausible_model_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str, toy_networks: None
) -> None:
    path = exchange.save(tmp_path / "x.safetensors", matching.unflatten(random_arrays(0)), ABOUT | change)
    with pytest.raises(WeightsError, match=message):
        exchange.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({DENSE: None}, "missing"),
        ({"more": np.zeros(1, np.float32)}, "unknown to the model"),
        ({DENSE: np.zeros((8, 32), np.float32)}, "transposed"),
        ({DENSE: np.zeros((32, 8), np.int32)}, "another type"),
        ({DENSE: np.full((32, 8), np.inf, np.float32)}, "not finite"),
    ],
)
def test_exports_that_do_not_fit_their_model_are_refused(tmp_path: Path, change: Flat, message: str) -> None:
    params = {name: value for name, value in (random_arrays(0) | change).items() if value is not None}
    exchange.save(tmp_path / "x.safetensors", matching.unflatten(params), ABOUT)
    with pytest.raises(WeightsError, match=message):
        import_weights(tmp_path / "x.safetensors", tmp_path / "artefact")
    assert not (tmp_path / "artefact" / "model.json").exists()
