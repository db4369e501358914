"""Several updates in one dispatch give what single updates give; on a CPU they are asked for by name."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import numpy as np
import pytest
import toys

from diffusion_distill import api
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Tract
from diffusion_distill.training import dispatch, loop, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.state import create
from diffusion_distill.training.step import StepInputs, make_step

SETTINGS = api.Settings(batch_size=8, log_every=7, checkpoint_every=10, keep_checkpoints=9, evaluate_every=0)
IN_FOURS = dataclasses.replace(SETTINGS, updates_per_dispatch=4)
TRACT = Tract((4, 2, 1), length=25 * 8, warmup=3)  # two phases, 25 updates


WORDS = ("update", "phase")


class Stopped(Exception):
    """The power goes out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Gaussian images, one of them damaged, that end when batch number `last` is asked for."""

    last: int = 10**9
    asked: Any = dataclasses.field(default_factory=itertools.count)
    inner: toys.GaussianSource = dataclasses.field(default_factory=lambda: toys.GaussianSource(DATA, size=60))
    num_classes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return self.inner.shape

    def __len__(self) -> int:
        return len(self.inner)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images at indices [batch]."""
        if next(self.asked) == self.last:
            raise Stopped
        found = self.inner.gather(indices)["x"]
        return {"x": np.where((indices == 3).reshape(-1, 1, 1, 1), np.float32(np.nan), found)}


DATA = toys.Gaussian(mean=0.1, std=0.4)


def same(found: dict[int, Artefact], wanted: dict[int, Artefact]) -> None:
    for steps in wanted:
        chex.assert_trees_all_close(found[steps].params, wanted[steps].params, rtol=1e-5, atol=1e-6)
        assert found[steps].provenance["skipped"] == wanted[steps].provenance["skipped"]


def records(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without speeds."""
    found = read_json_lines(folder / "metrics.jsonl")
    return [
        {name: value for name, value in record.items() if name not in ("images_per_second", "seconds")}
        for record in found
    ]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_dispatches_of_several_updates_make_the_same_run(
    teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, put = [], dispatch.put
    monkeypatch.setattr(dispatch, "put", lambda batches, mesh: sizes.append(len(batches)) or put(batches, mesh))
    whole = api.distill(teacher, Source(), TRACT, SETTINGS, tmp_path / "single")
    assert set(sizes) == {1}
    sizes.clear()
    found = api.distill(teacher, Source(), TRACT, IN_FOURS, tmp_path / "fours")
    assert sizes == [4, *[1] * 8, *[1] * 2, 4, *[1] * 3, 4]  # stops: 7, 10, 12, 14, 20, 21, 25
    same(found, whole)
    ours, theirs = records(tmp_path / "fours"), records(tmp_path / "single")
    assert [record["update"] for record in ours] == [7, 12, 14, 21, 25]
    assert sum(record["nonfinite"] for record in ours) == ours[-1]["skipped"] > 1
    for one, other in zip(ours, theirs, strict=True):
        assert {name: one[name] for name in WORDS} == {name: other.pop(name) for name in WORDS}
        assert {name: one[name] for name in other} == pytest.approx(other, rel=1e-4)
    assert checkpoints(tmp_path / "fours") == checkpoints(tmp_path / "single") == [9, 12, 20, 25]  # 10 was damaged

    with pytest.raises(Stopped):
        api.distill(teacher, Source(last=19), TRACT, IN_FOURS, tmp_path / "stopped")
    assert checkpoints(tmp_path / "stopped") == [9, 12, 19]  # data that fail save what there is
    same(api.distill(teacher, Source(), TRACT, IN_FOURS, tmp_path / "stopped"), whole)
    assert [record["update"] for record in records(tmp_path / "stopped")] == [7, 12, 14, 21, 25]


@pytest.mark.fast
@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize(
    "plan",
    [
        loop.Plan(),
        loop.Plan(log_every=7, checkpoint_every=10),
        loop.Plan(log_every=50, checkpoint_every=1000, nonfinite_limit=30, evaluate_every=300),
    ],
)
def test_dispatches_end_wherever_the_loop_has_something_to_do(plan: loop.Plan, size: int) -> None:
    begin, end, batch_size = 3, 1234, 8
    next_stop = lambda done: loop.next_stop(done, batch_size, plan)  # noqa: E731
    planned = list(dispatch.dispatches(begin, end, size, next_stop))
    assert {updates for _, updates in planned} <= {1, size}
    assert [first for first, _ in planned] == [begin, *(first + updates for first, updates in planned[:-1])]
    after = {first + updates for first, updates in planned}
    phases = [SimpleNamespace(updates=end)]
    due = {
        done
        for done in range(begin + 1, end + 1)
        if done % plan.log_every == 0
        or done % plan.checkpoint_every == 0
        or done % min(plan.log_every, plan.nonfinite_limit) == 0
        or loop.evaluation_due(done, phases, batch_size, plan.evaluate_every)  # type: ignore[arg-type]
    }
    assert due | {end} <= after
    assert len(planned) <= (end - begin) / size + (len(due) + 1) * size


@pytest.mark.fast
@pytest.mark.parametrize(
    ("asked", "most", "platform", "size"),
    [(0, 50, "cpu", 1), (0, 50, "gpu", 10), (0, 7, "tpu", 7), (4, 50, "cpu", 4), (25, 7, "gpu", 7)],
)
def test_the_size_of_dispatches_suits_the_devices(asked: int, most: int, platform: str, size: int) -> None:
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)], object))
    assert dispatch.dispatch_size(asked, most, mesh) == size  # type: ignore[arg-type]


def test_a_dispatch_gives_up_its_state_and_is_compiled_once(tiny_model: Model) -> None:
    mesh, optimizer = sharding.data_mesh(), make_optimizer(OptimizerSettings())
    method = Denoising(length="1K")
    rows = loop.rows_of(method.phases(tiny_model, 8)[0])
    several = dispatch.several(make_step(method.losses, tiny_model, None, optimizer, mesh), mesh)
    state = jax.device_put(create(toys.parameters(tiny_model), optimizer, []), sharding.replicated(mesh))
    for update in range(0, 6, 3):
        each = [StepInputs(rows, np.float32(0.1), {"eval": np.float32(1 / (update + k + 1))}) for k in range(3)]
        images = [{"x": np.full((8, 2, 2, 1), 0.1 * k, np.float32)} for k in range(3)]
        batches = dispatch.put(images, mesh)
        assert {array.sharding.shard_shape(array.shape) for array in jax.tree.leaves(batches)} == {(3, 1, 2, 2, 1)}
        before = state
        state, metrics = several(state, batches, dispatch.stacked(each), jax.random.key(0))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        assert all(np.shape(values) == (3,) for values in metrics.values())
    assert int(state.step) == 6 and several._cache_size() == 1  # type: ignore[attr-defined]
