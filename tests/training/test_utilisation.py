"""FLOPs of updates against counts of network calls by hand, and the utilisation that a run logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
import toys

from diffusion_distill import api
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Knowledge, Progressive, Tract
from diffusion_distill.networks import UNet
from diffusion_distill.training import loop, utilisation
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.settings import Settings
from diffusion_distill.training.state import create

MODEL = Model(toys.Perceptron(out_ch=1), (2, 2, 1), prediction="v")
UNET = UNet(32, 8, 1, (1,), 1, (), num_heads=1, num_classes=3, dropout=0.1)
LABELLED = Model(UNET, (4, 4, 1), prediction="v")

#: Method -> network calls in the loss of each phase; the student's gradient costs two more.
CALLS: dict[str, tuple[Model, Any, list[int]]] = {
    "denoising": (MODEL, Denoising(length=8), [1]),
    "btd": (MODEL, Progressive(2, 1, phase_length=8), [3]),  # student and twice the teacher
    "tract": (MODEL, Tract((4, 2, 1), length=16), [3, 3]),  # student, teacher, self-teacher
    "tract, heun": (MODEL, Tract((4, 2, 1), length=16, teacher_solver="heun"), [4, 3]),  # a Heun step calls twice
    "knowledge": (MODEL, Knowledge(steps=2, length=8), [2]),
    "labels and dropout": (LABELLED, Tract((2, 1), length=8), [3]),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_update_costs_its_network_calls(name: str) -> None:
    model, method, calls = CALLS[name]
    optimizer = make_optimizer(OptimizerSettings())
    params = toys.parameters(model)
    teacher = None if isinstance(method, Denoising) else model
    state = create(params, optimizer, method.averages, () if teacher is None else params)
    once = utilisation.forward_flops(model, params)
    rows = [loop.rows_of(phase) for phase in method.phases(model, 8)]
    costs = [utilisation.update_flops(method.losses, model, teacher, state, part) for part in rows]
    assert costs == [(count + 2) * once for count in calls]


@pytest.mark.parametrize("peaks", [{}, {"cpu": 1e9}], ids=["unknown", "named"])
def test_a_run_logs_its_utilisation_where_the_peak_is_named(
    peaks: Mapping[str, float],
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(utilisation, "PEAKS", peaks)
    source = toys.GaussianSource(toys.Gaussian(0.3, 0.2), size=20)
    made = api.train(tiny_model, source, Denoising(length=4 * 8), Settings(batch_size=8, log_every=2), tmp_path)
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [("mfu" in record, "flops_per_image" in record) for record in records] == [(bool(peaks),) * 2] * 2
    assert (" mfu " in capsys.readouterr().err) == bool(peaks)
    for record in records if peaks else ():
        assert record["flops_per_image"] == 3 * utilisation.forward_flops(tiny_model, made.params) > 0
        assert record["mfu"] > 0


@pytest.mark.fast
def test_a_meter_divides_by_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "PEAKS", {"cpu": 5e9})
    assert utilisation.named_peak() == 5e9 * jax.device_count()
    assert utilisation.Meter(flops_per_image=2_000_000, peak=4e9).figures(500.0)["mfu"] == 0.25
    monkeypatch.setattr(utilisation, "PEAKS", {"TPU v4": 275e12})
    assert utilisation.named_peak() == 0
