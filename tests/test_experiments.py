"""experiments/dode_ddpm_digits.py: its teacher is DDPM's, and the whole command with a toy for a teacher."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toys
from places import ROOT

from diffusion_distill.denoisers.model import Model
from diffusion_distill.process.levels import Level
from diffusion_distill.training.artefact import Artefact


@pytest.fixture(scope="module")
def dode() -> Iterator[Any]:
    """The module, which is in no package and imports the one beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
        yield importlib.import_module("dode_ddpm_digits")


@pytest.mark.fast
def test_the_teacher_is_trained_as_ddpm_trains(dode: Any) -> None:
    """Of the 1000 betas from 1e-4 to 0.02 it knows the indices, and its loss is that of eps, everywhere alike."""
    model, method, index = dode.MODEL, dode.method(1.0), np.array([0, 1, 500, 999])
    assert (model.prediction, model.discrete_steps) == ("eps", 1000)
    level = Level(*(np.float32(part) for part in model.process.level((index + 1) / 1000)))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index]
    np.testing.assert_allclose(level.alpha**2, abar, rtol=1e-5)
    told = model.time_input.time(Level(*map(jax.numpy.asarray, level)), model.process)
    np.testing.assert_allclose(told, index, atol=0.02)
    drawn = np.asarray(method.times(jax.random.key(0), 5000))
    assert (drawn.min(), drawn.max()) == (np.float32(1e-3), 1) and len(np.unique(drawn)) > 900
    x, eps = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 1)).astype(np.float32)
    toy = Model(toys.Perceptron(1), model.shape, model.process, prediction="eps", time_input=model.time_input)
    params = toys.parameters(toy)
    z = np.sqrt(abar).reshape(4, 1, 1, 1) * x + np.sqrt(1 - abar).reshape(4, 1, 1, 1) * eps
    raw = toy.raw(params, np.float32(z), level, None, None)
    found = method.losses_at(toy.denoiser(params), level, x, eps)
    np.testing.assert_allclose(found, np.mean((raw - eps) ** 2, axis=(1, 2, 3)), rtol=1e-4)


def test_one_command_fits_and_compares(
    dode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], toy_networks: None
) -> None:
    """The tables are those of the results, and fits come nearer to DDIM in a thousand steps."""
    for name in ("use_cpu_devices", "keep_compiled"):
        monkeypatch.setattr(dode, name, lambda *arguments: None)
    monkeypatch.setattr(dode, "SOLVERS", {"DDIM": "ddim", "DPM-Solver-3": dode.SOLVERS["DPM-Solver-3"]})
    model = Model(toys.Perceptron(1), (8, 8, 1), dode.MODEL.process, prediction="eps")
    Artefact(model, toys.parameters(model)).save(tmp_path / "teacher")
    arguments = [f"--teacher={tmp_path / 'teacher'}", "--features=pixels", f"--out={tmp_path}", "--count=72"]
    dode.main([*arguments, "--nfe", "5"])
    said, written = capsys.readouterr().out, (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "comparison" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4 and written in said
    lines = [line.replace("*", "") for line in written.splitlines()]
    for title, name in dode.SOLVERS.items():
        base, fitted = (next(r for r in rows if (r["solver"], r["fitted"]) == (name, f)) for f in (False, True))
        cells = [f"| {title} | {base[m]:.3g} → {fitted[m]:.3g} |" for m in ("error", "frechet")]
        assert cells == [line for line in lines if line.startswith(f"| {title} |")]
        assert fitted["error"] < base["error"]
