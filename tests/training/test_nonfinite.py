"""Updates that are not finite: a run stops, keeps its last good state, and its figures count what was skipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import equal

from diffusion_distill import api
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Tract
from diffusion_distill.training import nonfinite
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.state import create, last_good, next_phase

pytestmark = pytest.mark.usefixtures("one_device")

SOURCE = toys.GaussianSource(toys.Gaussian(mean=0.1, std=0.4), size=20)
SETTINGS = api.Settings(batch_size=8, log_every=3, checkpoint_every=2, keep_checkpoints=1, nonfinite_limit=6)


@dataclasses.dataclass(frozen=True, eq=False)
class Spoilt:
    """Gaussian images whose batch number k = 1, 2, ... is NaN from `first` on, up to `last`."""

    first: int
    last: int = 10**9
    seen: list[int] = dataclasses.field(default_factory=list)
    num_classes: int = 0
    shape: tuple[int, int, int] = SOURCE.shape

    def __len__(self) -> int:
        return len(SOURCE)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images at indices [batch], or NaN."""
        self.seen.append(1)
        bad = self.first <= len(self.seen) <= self.last
        return {"x": SOURCE.gather(indices)["x"] * np.float32(np.nan if bad else 1)}


def saved(folder: Path) -> list[int]:
    """The checkpoints in a workdir."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_a_run_stops_keeps_its_last_good_state_and_goes_on_from_it(tiny_model: Model, tmp_path: Path) -> None:
    method = Denoising(length=18 * 8, warmup=2, learning_rate=1e-2)
    whole = api.train(tiny_model, SOURCE, method, SETTINGS, tmp_path / "whole")
    folder = tmp_path / "spoilt"
    with pytest.raises(
        ValueError,
        match=r"since number 8 was finite: 8 in a row in the phase 'teacher', .* loss nan and gradient norm nan.*"
        r"after update 7 is saved: the same command goes on.*in the data.*learning rate \(0\.01 here\).*limit is 6",
    ) as stopped:
        api.train(tiny_model, Spoilt(8), method, SETTINGS, folder)
    assert isinstance(stopped.value, nonfinite.NonFinite)
    assert saved(folder) == [7], "the last good state, not pushed out by copies of itself"
    assert not (folder / "teacher").exists()
    content = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in content, "which is no JSON"
    records = {record["update"]: record for record in map(json.loads, content.splitlines())}
    assert [records[k]["nonfinite"] for k in (3, 6, 9, 12, 15)] == [0, 0, 2, 3, 3]
    assert [records[k]["skipped"] for k in (3, 6, 9, 12, 15)] == [0, 0, 2, 5, 8]
    assert records[9]["loss"] > 0 and records[9]["grad_norm"] > 0, "of the one that was finite"
    assert records[12]["loss"] is None and records[12]["grad_norm"] is None
    mended = api.train(tiny_model, SOURCE, method, SETTINGS, folder)
    assert equal(mended.params, whole.params), "as if nothing had happened"
    assert mended.provenance["skipped"] == 0


@pytest.mark.parametrize("length", [4, 20], ids=["shorter than the limit", "longer"])
def test_a_run_that_is_never_finite_makes_no_artefact(length: int, tiny_model: Model, tmp_path: Path) -> None:
    method = Denoising(length=length * 8)
    with pytest.raises(nonfinite.NonFinite, match=r"since number 1 was finite.*no good state.*begins anew"):
        api.train(tiny_model, Spoilt(1), method, SETTINGS, tmp_path)
    assert not (tmp_path / "teacher").exists() and not saved(tmp_path)
    api.train(tiny_model, SOURCE, method, SETTINGS, tmp_path)
    assert (tmp_path / "teacher" / "model.json").exists()


def test_a_phase_that_is_never_finite_makes_no_student(teacher: Artefact, tmp_path: Path) -> None:
    method = Tract((4, 2, 1), length=8 * 8)  # two phases of four updates
    whole = api.distill(teacher, SOURCE, method, SETTINGS, tmp_path / "whole")
    folder = tmp_path / "spoilt"
    with pytest.raises(nonfinite.NonFinite, match=r"since number 5 .* 4 in a row in the phase 'tract 2→1'"):
        api.distill(teacher, Spoilt(5), method, SETTINGS, folder)
    assert (folder / "student_2").exists() and not (folder / "student_1").exists()
    mended = api.distill(teacher, SOURCE, method, SETTINGS, folder)
    assert all(equal(mended[n].params, whole[n].params) for n in (2, 1))
    with pytest.raises(nonfinite.NonFinite, match=r"Nothing is saved, because the run has no workdir"):
        api.distill(teacher, Spoilt(1), method, SETTINGS)


def test_updates_that_are_skipped_now_and_then_stop_nothing(tiny_model: Model, tmp_path: Path) -> None:
    made = api.train(tiny_model, Spoilt(4, 8), Denoising(length=12 * 8), SETTINGS, tmp_path)
    assert (made.provenance["updates"], made.provenance["skipped"]) == (12, 5)
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [record["nonfinite"] for record in records] == [0, 3, 2, 0]
    assert [record["loss"] is None for record in records] == [False, True, False, False]


@pytest.mark.fast
def test_the_last_good_state_is_that_before_the_skipped_ones(tiny_model: Model) -> None:
    optimizer = make_optimizer(OptimizerSettings())
    state = create(toys.parameters(tiny_model), optimizer, ["self_teacher"])
    good = state.replace(step=jnp.int32(7), skipped=jnp.int32(2))
    later = good.replace(step=jnp.int32(12), skipped=jnp.int32(7), nonfinite=jnp.int32(5))
    assert equal(last_good(later), good) and equal(last_good(good), good)
    for restart in (True, False):
        begun = next_phase(later, optimizer, restart, reset_average=False)
        assert [int(n) for n in (begun.step, begun.skipped, begun.nonfinite)] == [12, 7, 0]
        assert equal(jax.tree.map(jnp.asarray, last_good(begun)), begun), "a phase never goes back before its begin"


@pytest.mark.fast
def test_a_limit_is_a_positive_whole_number() -> None:
    for limit in (0, 1.5):
        with pytest.raises(ValueError, match=rf"nonfinite_limit must be a whole number of at least 1, got {limit}"):
            api.Settings(nonfinite_limit=limit)  # type: ignore[arg-type]
