"""docs/diffusers.md shows the distances that `experiments/pipelines.py` has written, and what is said of them is so."""

from __future__ import annotations

import json

import pytest
from places import ROOT

from experiments.pipelines import table

FOUND = json.loads((ROOT / "docs" / "diffusers.json").read_text(encoding="utf-8"))["distances"]


@pytest.mark.fast
def test_the_page_shows_what_was_measured() -> None:
    assert table(FOUND) in (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")


@pytest.mark.fast
def test_fits_gain_in_every_precision_and_on_chosen_levels() -> None:
    assert len(FOUND) == 2 * 3 * 4 * 3
    for name, distance in FOUND.items():
        solver, calls, way, precision = name.split("|")
        if way != "plain":
            assert distance < FOUND[f"{solver}|{calls}|plain|{precision}"], name
