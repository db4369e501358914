"""What a run needs of devices, found before it begins, against the run itself."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import toys

from diffusion_distill import api
from diffusion_distill.api import ahead
from diffusion_distill.api.ahead import Ahead, largest
from diffusion_distill.data.sources import from_arrays
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Progressive, Tract
from diffusion_distill.training import loop, sharding, utilisation
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.settings import Settings
from diffusion_distill.training.state import create

TRACT = Tract((8, 4, 1), length="1K", teacher_solver="heun")


@pytest.mark.fast
@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 100, 1000])
@pytest.mark.parametrize("start", [1, 8, 64])
def test_the_largest_that_fits_is_found(most: int, start: int) -> None:
    tried: list[int] = []
    found = largest(lambda count: tried.append(count) or count <= most, start)
    assert found <= most <= found + max(1, found // 8) and len(tried) < 20
    assert len(set(tried)) == len(tried) and 0 not in tried


@pytest.mark.fast
def test_the_state_of_a_run_is_as_large_as_was_said(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "LEAST_SPLIT", 64)
    said = Ahead.of(None, tiny_model, TRACT, Settings(batch_size=16, params_parallel=4))
    params, optimizer = toys.parameters(tiny_model), make_optimizer(OptimizerSettings())
    made = sharding.place(create(params, optimizer, TRACT.averages, params), said.mesh)
    there = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made))
    assert said.state_bytes() == there
    assert said.parameters == sum(leaf.size for leaf in jax.tree.leaves(made.params))


@pytest.mark.parametrize("method", [TRACT, Progressive(8, 1, phase_length="1K")], ids=["tract", "btd"])
def test_the_operations_of_a_run_are_those_of_its_updates(method: Tract | Progressive, tiny_model: Model) -> None:
    said = Ahead.of(None, tiny_model, method, Settings(batch_size=16))
    each = [
        utilisation.update_flops(method.losses, tiny_model, tiny_model, said.state, loop.rows_of(phase))
        for phase in method.phases(tiny_model, 16)
    ]
    assert len(each) > 1
    updates = [phase.updates for phase in said.phases]
    assert said.flops() == sum(16 * count * flops for count, flops in zip(updates, each, strict=True))


def test_figures_are_those_of_the_compiled_update(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MEMORY", {"cpu": 30_000})
    monkeypatch.setattr(ahead, "PEAKS", {"cpu": 1e9})
    said = Ahead.of(tiny_model, None, Denoising(length="1K"), Settings(batch_size=16))
    figures, hours = said.figures(), said.flops() / (ahead.UTILISATION * 1e9 * 8) / 3600
    assert figures["bytes of an update"] > figures["state bytes"] > 0
    assert figures[f"hours at a utilisation of {ahead.UTILISATION}"] == pytest.approx(hours)
    batch = figures["largest batch that fits"]
    assert batch >= 16 and said.fits(batch) and not said.fits(2 * batch)
    assert figures["fits"]


def test_a_run_that_cannot_fit_is_refused_before_it_begins(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = from_arrays(np.zeros((16, 2, 2, 1), np.float32))
    monkeypatch.setattr(utilisation, "MEMORY", {"cpu": 1000})
    with pytest.raises(ValueError, match=r"GiB of each device, but a cpu has .*params_parallel is 1 of 8 devices"):
        api.train(tiny_model, source, Denoising(length="1K"), Settings(batch_size=16), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.fast
def test_chips_that_nobody_knows_are_refused_in_words() -> None:
    pytest.importorskip("libtpu", reason="needs libtpu, in the extra [tpu-compile]")
    from diffusion_distill.training.topologies import devices_of

    with pytest.raises(ValueError, match="no TPUs 'v99:2x2'"):
        devices_of("v99:2x2")
