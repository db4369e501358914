"""What may change when a run goes on in its workdir, and what it then does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from toys import equal

from diffusion_distill import api, data
from diffusion_distill.api.training import _description, _provenance, _same_run
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Progressive, Tract
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import OptimizerSettings
from diffusion_distill.training.resuming import SameRun

SETTINGS = api.Settings(batch_size=8)


def compared(
    folder: Path,
    model: Model,
    before: Any,
    now: Any,
    *,
    done: int = 0,
    settings: api.Settings = SETTINGS,
    new_settings: api.Settings | None = None,
    edit: Any = lambda description: None,
) -> tuple[list[str], list[str]]:
    """(accepted, refused) of a run that has made `done` updates with the method `before` and goes on with `now`."""
    source, new_settings = data.from_arrays(np.zeros((40, 2, 2, 1), np.uint8)), new_settings or settings
    there = _description(model, None, source, _provenance(None, before, settings))
    asked = _description(model, None, source, _provenance(None, now, new_settings))
    there, asked = (json.loads(json.dumps(description)) for description in (there, asked))
    edit(there)
    (folder / "checkpoints" / str(done) / "params").mkdir(parents=True, exist_ok=True)
    same: SameRun = _same_run(model, now, new_settings, None)
    return same(folder, there, asked)


@pytest.mark.fast
@pytest.mark.parametrize(
    "change",
    [
        {"log_every": 10}, {"checkpoint_every": 4}, {"keep_checkpoints": 3}, {"evaluate_every": "1K"},
        {"evaluate_count": 8}, {"evaluate_features": "runs/classifier"}, {"tensorboard": True}, {"wandb": "project"},
        {"updates_per_dispatch": 4}, {"remat": True},
    ],
)  # fmt: skip
def test_what_changes_no_number_may_change(change: dict[str, Any], tiny_model: Model, tmp_path: Path) -> None:
    other, [(name, value)] = dataclasses.replace(SETTINGS, **change), change.items()
    accepted, refused = compared(tmp_path, tiny_model, Denoising(), Denoising(), new_settings=other)
    assert (accepted, refused) == ([f"settings.{name} {value!r} instead of {getattr(SETTINGS, name)!r}"], [])


@pytest.mark.fast
@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 16},
        {"seed": 1},
        {"parts": 2},
        {"flip": True},
        {"low_rank": 4},
        {"low_rank_pattern": "conv"},
        {"optimizer": OptimizerSettings(b1=0.5)},
    ],
)
def test_what_changes_numbers_may_not(change: dict[str, Any], tiny_model: Model, tmp_path: Path) -> None:
    other = dataclasses.replace(SETTINGS, **change)
    accepted, [refused] = compared(tmp_path, tiny_model, Denoising(), Denoising(), new_settings=other)
    assert not accepted and refused.startswith(f"settings.{next(iter(change))}")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("before", "now", "done", "accepted", "refused"),
    [
        (64, "0.0625K", 8, "", ""),  # one length
        ("1K", "2**10", 8, "", ""),
        (64, 128, 0, "16 updates instead of 8", ""),
        (64, 128, 8, "16 updates instead of 8", ""),  # finished, and going on
        (64, 48, 5, "6 updates instead of 8", ""),
        (64, 32, 5, "", "5 updates are done already, and phase 1 would end after 4"),
    ],
)
def test_lengths_of_one_phase(
    before: Any, now: Any, done: int, accepted: str, refused: str, tiny_model: Model, tmp_path: Path
) -> None:
    methods = Denoising(length=before), Denoising(length=now)
    found = compared(tmp_path, tiny_model, *methods, done=done)
    for words, said in zip(found, (accepted, refused), strict=True):
        assert len(words) == bool(said)
        assert said in "".join(words)


@pytest.mark.fast
def test_a_longer_length_says_what_it_does_to_average_and_rate(tiny_model: Model, tmp_path: Path) -> None:
    """Momentum residual^(1 / updates): 1e-3^(1/8) and 1e-3^(1/16)."""
    before, now = (Denoising(length=length, residual=1e-3, anneal=True) for length in (64, 128))
    [said], _ = compared(tmp_path, tiny_model, before, now, done=4)
    assert f"average momentum of teacher {1e-3 ** (1 / 16):.6g} from here on, {1e-3 ** (1 / 8):.6g} before" in said
    assert "the learning rate of teacher falls to 0 at its new end" in said


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "done", "reason"),
    [
        ({"length": 256}, 7, ""),  # in the first of two phases of 8 updates
        ({"length": 256}, 8, ""),  # at its end, before the second
        ({"length": 256}, 9, "phase 1 is finished, after update 8, and would end after 16 now"),
        ({"length": 256, "shares": (1, 3)}, 9, ""),  # the second phase alone is longer
        ({"length": 256, "shares": (1, 3)}, 16, ""),
        ({"length": 96, "shares": (2, 1)}, 13, "13 updates are done already, and phase 2 would end after 12"),
    ],
)
def test_finished_phases_keep_their_updates(
    change: dict[str, Any], done: int, reason: str, tiny_model: Model, tmp_path: Path
) -> None:
    before = Tract((4, 2, 1), length=128)
    accepted, refused = compared(tmp_path, tiny_model, before, dataclasses.replace(before, **change), done=done)
    assert bool(refused) == bool(reason) and reason in "".join(refused)
    assert bool(accepted) != bool(refused)


@pytest.mark.fast
def test_phases_of_a_length_of_their_own(tiny_model: Model, tmp_path: Path) -> None:
    before, now = (Progressive(4, 1, phase_length=length) for length in (64, 128))
    assert not compared(tmp_path / "first", tiny_model, before, now, done=16)[1]  # the last two are twice as long
    assert compared(tmp_path / "second", tiny_model, before, now, done=17)[1]


@pytest.mark.fast
def test_fields_of_newer_versions_count_as_their_defaults(tiny_model: Model, tmp_path: Path) -> None:
    def older(description: dict[str, Any]) -> None:
        del description["settings"]["flip"], description["settings"]["optimizer"]["b1"]
        del description["method_settings"]["cold_start"], description["model"]["network"]["dropout"]

    assert compared(tmp_path, tiny_model, Denoising(), Denoising(), edit=older) == ([], [])
    changed = dataclasses.replace(SETTINGS, flip=True)
    _, refused = compared(tmp_path, tiny_model, Denoising(), Denoising(), new_settings=changed, edit=older)
    assert refused == ["settings.flip (there False, asked True)"]


@pytest.mark.fast
@pytest.mark.parametrize(("there", "goes_on"), [(41, True), (44, True), (45, False), (39, False)])
def test_a_few_images_may_have_been_removed(there: int, goes_on: bool, tiny_model: Model, tmp_path: Path) -> None:
    """The data have 40."""
    edit = lambda description: description["data"].update(images=there)  # noqa: E731
    accepted, refused = compared(tmp_path, tiny_model, Denoising(), Denoising(), edit=edit)
    assert accepted == ([f"40 images instead of {there}, in another order from here on"] if goes_on else [])
    assert refused == ([] if goes_on else [f"data.images (there {there}, asked 40)"])


@pytest.mark.fast
@pytest.mark.parametrize("content", ["", "[]", '{"model"', "\0" * 50])
def test_a_damaged_description_is_mended_from_a_checkpoint(
    content: str, tiny_model: Model, tmp_path: Path, one_device: None
) -> None:
    source, description = toys.GaussianSource(toys.Gaussian(0.0, 0.5)), tmp_path / "run.json"
    with pytest.warns(UserWarning, match=r"run\.json .*from this command"):  # nothing is saved yet
        description.write_text(content)
        made = api.train(tiny_model, source, Denoising(length=32), SETTINGS, tmp_path)
    told = description.read_text()
    description.write_text(content)
    with pytest.warns(UserWarning, match=r"run\.json .*from the newest checkpoint; .*run\.json\.damaged"):
        again = api.train(tiny_model, source, Denoising(length=32), SETTINGS, tmp_path)
    assert description.read_text() == told and equal(made.params, again.params)
    description.write_text(content)
    other = Denoising(length=32, learning_rate=1e-3)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"another run.*learning_rate"):
        api.train(tiny_model, source, other, SETTINGS, tmp_path)


def test_a_run_that_goes_on_for_longer_is_the_longer_run(
    tiny_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = toys.GaussianSource(toys.Gaussian(0.0, 0.5))
    api.train(tiny_model, source, Denoising(length=32), SETTINGS, tmp_path)
    other = dataclasses.replace(SETTINGS, log_every=2)
    longer = api.train(tiny_model, source, Denoising(length=64), other, tmp_path)
    said = capsys.readouterr().out
    assert "goes on with settings.log_every 2 instead of 50\n" in said
    assert "goes on with method_settings.length 64 instead of 32: 8 updates instead of 4\n" in said
    assert equal(longer.params, api.train(tiny_model, source, Denoising(length=64), SETTINGS).params)
    assert Artefact.load(tmp_path / "teacher").provenance["updates"] == 8
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["log_every"] == 2
    with pytest.raises(ValueError, match=r"8 updates are done already, and phase 1 would end after 4\. Choose another"):
        api.train(tiny_model, source, Denoising(length=32), other, tmp_path)


def test_numbers_of_numpy_are_numbers(tiny_model: Model, tmp_path: Path) -> None:
    """Lengths, batches and seeds often come from arrays; a length may be a float such as 1e6 too."""
    source, plain = toys.GaussianSource(toys.Gaussian(0.0, 0.5)), Denoising(length=64, learning_rate=0.5)
    settings = dataclasses.replace(SETTINGS, batch_size=np.int64(8), seed=np.uint64(2**64 - 1), log_every=np.int8(3))
    method = Denoising(length=np.int64(32), learning_rate=np.float32(0.5))  # type: ignore[arg-type]
    api.train(tiny_model, source, method, settings, tmp_path)
    same = dataclasses.replace(SETTINGS, seed=2**64 - 1)
    api.train(tiny_model, source, dataclasses.replace(plain, length=32.0), same, tmp_path)  # type: ignore[arg-type]
    longer = api.train(tiny_model, source, plain, same, tmp_path)
    assert longer.provenance["updates"] == 8
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["seed"] == 2**64 - 1
    assert equal(longer.params, api.train(tiny_model, source, plain, same).params)
