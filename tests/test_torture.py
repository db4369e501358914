"""tests/torture.py: a few cycles in a program of its own, which forks before JAX starts."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import places
import pytest
import torture


@pytest.mark.skipif(not hasattr(torture.os, "fork"), reason="needs fork")
def test_a_journey_that_is_killed_ends_as_one_that_is_not() -> None:
    program = [sys.executable, places.TESTS / "torture.py", "--cycles=2", "--minutes=5", "--seed=1"]
    done = subprocess.run(program, cwd=places.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "cycles: 2," in done.stdout, done.stdout


@pytest.mark.fast
def test_damage_is_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "file").write_bytes(b"content")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    assert {torture.damage(tmp_path, random.Random(k)) for k in range(30)} == {
        "nothing",
        "checkpoint",
        "run.json",
        "metrics",
    }
    assert (tmp_path / "checkpoints" / "1" / "file").read_bytes() == b"content"
    assert (tmp_path / "checkpoints" / "2" / "file").read_bytes() != b"content"
    assert (tmp_path / "metrics.jsonl").stat().st_size and (tmp_path / "run.json").read_bytes() != b"{}"
