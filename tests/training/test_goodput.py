"""Where the time of a run goes, and the word of a run in which nothing moves."""

from __future__ import annotations

import time

import pytest

from diffusion_distill.training import goodput
from diffusion_distill.training.goodput import Goodput

pytestmark = pytest.mark.fast


def test_every_second_belongs_to_one_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    def items():
        for k in range(3):
            passes(2)
            yield k

    clock = Goodput()
    passes(10)
    for k in clock.waiting(items()):
        passes(1)
        clock.moved(k + 1)
        with clock.spent("saving"):
            passes(4)
            with clock.spent("evaluating"):
                passes(0.5)
    # the first item's second is of the restart, which ends with the first update
    assert clock.seconds() == {"training": 2, "data": 6, "saving": 12, "evaluating": 1.5, "restarting": 11}
    assert sum(clock.seconds().values()) == now[0] - 100


def test_a_run_in_which_nothing_moves_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(goodput, "PATIENCE", 0.04)
    said = ""
    with Goodput() as clock:
        clock.moved(7)
        with clock.spent("data"):
            end = time.monotonic() + 20
            while "No update" not in said and time.monotonic() < end:
                time.sleep(0.01)
                said += capsys.readouterr().err
    assert "after update 7: it waits for the next batch" in said
