"""tests/programs.py: small programs of users, run with the names of today."""

from __future__ import annotations

from pathlib import Path

import programs
import pytest
from places import SHARED

FOUND = sorted(path for folder in ("cases", "attack") for path in (SHARED / folder).glob("*.py"))


@pytest.mark.parametrize(("source", "status"), [("print('fine')", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_the_exit_status_of_a_program_is_told(source: str, status: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(source)
    assert programs.outcome(program)[0] == status


@pytest.mark.fast
def test_old_names_are_those_of_today() -> None:
    old = 'from diffusion_distill.metrics import read_reference\nmodel = Model(net, image_shape=(8, 8, 1))\nb["image"]'
    new = 'from diffusion_distill.evaluation import read_reference\nmodel = Model(net, shape=(8, 8, 1))\nb["x"]'
    assert programs.renamed(old) == new and programs.renamed(new) == new


@pytest.mark.slow
@pytest.mark.parametrize("program", FOUND, ids=lambda path: path.stem)
def test_a_program_finds_nothing_wrong(program: Path) -> None:
    status, last = programs.outcome(program)
    assert status == 0, last
