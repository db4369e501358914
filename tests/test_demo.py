"""experiments/digits.py: the demo runs to its end, with the help of a second process or without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from places import ROOT

from experiments import digits

DEMO = ROOT / "experiments" / "digits.py"


@pytest.fixture
def second(monkeypatch, tmp_path):
    """Makes a program the second process; it is told OUT and the part as the demo is."""

    def becomes(program: str) -> None:
        monkeypatch.setattr(digits, "CORES", 2)
        script = tmp_path / "second.py"
        script.write_text(program)
        monkeypatch.setattr(sys, "argv", [str(script)])

    return becomes


@pytest.mark.fast
def test_a_second_process_is_told_what_to_do_and_waited_for(second, tmp_path, capsys):
    second(
        "import sys, time, pathlib; time.sleep(0.3); print(sys.argv[1:]); pathlib.Path(sys.argv[0] + '.done').touch()"
    )
    with digits.beside("others", tmp_path):
        pass
    assert (tmp_path / "second.py.done").exists()
    assert (tmp_path / "others.log").read_text().strip() == str([f"--out={tmp_path}", "--part=others"])
    told = capsys.readouterr().out
    assert "BTD's students" in told and "status" not in told


@pytest.mark.fast
def test_the_demo_goes_on_without_a_second_process_that_fails(second, tmp_path, capsys):
    second("raise SystemExit(3)")
    with digits.beside("judge", tmp_path):
        pass
    assert "ended with status 3; this one goes on" in capsys.readouterr().out


@pytest.mark.fast
def test_no_second_process_on_one_core(second, tmp_path, monkeypatch):
    second("raise SystemExit(3)")
    monkeypatch.setattr(digits, "CORES", 1)
    with digits.beside("judge", tmp_path):
        pass
    assert not (tmp_path / "judge.log").exists()


WAITS = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from experiments.digits import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(60)
print("nobody ended it")
"""


def test_a_second_process_ends_with_the_first(second, tmp_path):
    second(WAITS)
    with pytest.raises(ZeroDivisionError), digits.beside("others", tmp_path):
        while "ready" not in (told := (tmp_path / "others.log").read_text()):
            assert "Error" not in told
            time.sleep(0.05)
        raise ZeroDivisionError
    assert "nobody" not in (tmp_path / "others.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
def test_the_demo(cores, tmp_path):
    """A hundredth of its length, with a second process and without: the same runs, the same report."""
    program = f"import runpy, os; os.cpu_count = lambda: {cores}; runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    start = tmp_path / "start.py"
    start.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, start, "--scale=0.01", f"--out={tmp_path / 'run'}"], check=True, env=environment)
    folder = tmp_path / "run"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    methods = ["real, held out", *["teacher, DDIM"] * 4, *["BTD"] * 3, *["TRACT"] * 3]
    assert [row["method"] for row in rows] == methods
    assert [row["nfe"] for row in rows] == ["", 64, 4, 2, 1, 4, 2, 1, 4, 2, 1]
    assert all(np.isfinite([row["frechet"], row["classifier frechet"]]).all() for row in rows)
    for name in ("report.html", "picture.png", "loss.png", "tract_1/student_1", "tract_4/student_4", "btd/student_1"):
        assert (folder / name).exists()
    there = (folder / "others.log").read_text() if cores > 1 else ""
    assert ("btd 2→1: " in there) == ("tract 8→4: " in there) == (cores > 1)
